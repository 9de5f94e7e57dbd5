"""What turns cost: as many busy adapters as have slots in the batch, and twice as many.

Starts a gateway of the tiny model with `--max-loras 2`. Callers of each adapter ask in a closed
loop, with answers of other lengths each. Printed is what all got together, what the least served
adapter got, and the longest wait for a first token. The exit code is 0 whenever it could measure.

    python -m tests.bench.slots
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
import uvloop

from engine.models import resolve_model
from lora_gateway.v1 import inference_pb2 as pb
from lora_gateway.v1.inference_pb2_grpc import InferenceStub
from tests.bench.machine import Machine
from tests.e2e.gateway_process import GatewayProcess, gateway_process
from tests.tiny_adapter import write_tiny_adapter

if TYPE_CHECKING:
    from lora_gateway.v1.inference_pb2_grpc import InferenceAsyncStub

MAX_LORAS = 2
ADAPTERS = tuple(f"adapter-{number}" for number in range(2 * MAX_LORAS))
FLAGS = ("--max-loras", str(MAX_LORAS), "--max-cpu-loras", str(len(ADAPTERS)))
IN_FLIGHT = 32
"""Over all adapters."""
SHORTEST, LONGEST = 16, 128
"""Tokens of an answer, each as likely."""
WARM_UP_S = 3.0
OPTIONS = [("grpc.use_local_subchannel_pool", 1)]


@dataclass(slots=True)
class Phase:
    """What one load got, in the time that was measured."""

    seconds: float
    tokens: Counter[str] = field(default_factory=Counter)
    """By adapter."""
    longest_wait_s: dict[str, float] = field(default_factory=dict)
    """For a first token, by adapter; of a call that got none, until the end."""

    @property
    def rate(self) -> float:
        """Tokens a second, over all."""
        return self.tokens.total() / self.seconds


class Load:
    """Callers that ask in a closed loop."""

    def __init__(self, address: str, adapters: Sequence[str], seconds: float, seed: int) -> None:
        self._address = address
        self._adapters = adapters
        self._random = random.Random(seed)
        self._begin_s = time.monotonic() + WARM_UP_S
        self._end_s = self._begin_s + seconds
        self._phase = Phase(seconds, Counter(dict.fromkeys(adapters, 0)))

    async def run(self) -> Phase:
        callers = [
            asyncio.create_task(self._call_often(self._adapters[number % len(self._adapters)]))
            for number in range(IN_FLIGHT)
        ]
        await asyncio.sleep(self._end_s - time.monotonic())
        for caller in callers:
            caller.cancel()
        await asyncio.gather(*callers, return_exceptions=True)
        return self._phase

    async def _call_often(self, adapter: str) -> None:
        async with grpc.aio.insecure_channel(self._address, options=OPTIONS) as channel:
            while True:
                stub: InferenceAsyncStub = InferenceStub(channel)
                await self._call(stub, adapter)

    async def _call(self, stub: InferenceAsyncStub, adapter: str) -> None:
        sampling = pb.SamplingParams(
            max_tokens=self._random.randint(SHORTEST, LONGEST), temperature=0, ignore_eos=True
        )
        request = pb.GenerateRequest(text="Once upon a time", adapter=adapter, sampling=sampling)
        begin_s, waits = time.monotonic(), True
        try:
            async for event in stub.GenerateStream(request, timeout=600):
                if waits:
                    waits = False
                    self._note_wait(adapter, begin_s)
                if event.HasField("delta") and self._begin_s <= time.monotonic() < self._end_s:
                    self._phase.tokens[adapter] += 1
        finally:
            if waits:
                self._note_wait(adapter, begin_s)

    def _note_wait(self, adapter: str, begin_s: float) -> None:
        waited_s = time.monotonic() - max(begin_s, self._begin_s)
        longest_s = self._phase.longest_wait_s
        longest_s[adapter] = max(longest_s.get(adapter, 0.0), waited_s)


def main() -> None:
    """Entry of the command."""
    options = _options()
    machine = Machine.here()
    with tempfile.TemporaryDirectory(prefix="bench-slots-") as name:
        folder = Path(name)
        model = resolve_model("tiny", folder)
        adapters = {
            adapter: write_tiny_adapter(folder / adapter, model, seed=seed, rank=8)
            for seed, adapter in enumerate(ADAPTERS, start=1)
        }
        with gateway_process(folder, adapters=adapters, extra=FLAGS) as gateway:
            print(machine)
            few, many = _measure(gateway, options)
    print(
        f"{IN_FLIGHT} in flight, answers of {SHORTEST} to {LONGEST} tokens, "
        f"{options.rounds} times {options.seconds:g} s of each, in turns"
    )
    _print(f"{MAX_LORAS} adapters on {MAX_LORAS} slots", few)
    _print(f"{len(ADAPTERS)} adapters on {MAX_LORAS} slots", many)


def _measure(
    gateway: GatewayProcess, options: argparse.Namespace
) -> tuple[list[Phase], list[Phase]]:
    """Both loads, in turns."""
    phases: tuple[list[Phase], list[Phase]] = ([], [])
    for round in range(options.rounds):
        for kind in (0, 1) if round % 2 == 0 else (1, 0):
            adapters = ADAPTERS[:MAX_LORAS] if kind == 0 else ADAPTERS
            load = Load(gateway.address, adapters, options.seconds, round)
            phases[kind].append(uvloop.run(load.run()))
    return phases


def _print(what: str, phases: Sequence[Phase]) -> None:
    rates = [phase.rate for phase in phases]
    shares = [
        min(phase.tokens.values()) / statistics.mean(phase.tokens.values()) for phase in phases
    ]
    waits = [max(phase.longest_wait_s.values()) for phase in phases]
    print(
        f"{what}: {statistics.median(rates):,.0f} tokens/s "
        f"({min(rates):,.0f} to {max(rates):,.0f}), "
        f"the least served adapter got {min(shares):.0%} of an even share, "
        f"longest wait for a first token {max(waits):.2f} s"
    )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.slots", description=__doc__)
    parser.add_argument("--seconds", type=float, default=15.0, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=4, help="of both loads")
    return parser.parse_args()


if __name__ == "__main__":
    main()
