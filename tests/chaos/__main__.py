"""Ten blows of chance: engines and workers are killed or stopped under load, and nothing is lost
but the calls that they had.

    python -m tests.chaos [--blows 10] [--seed N] [--keep FOLDER]

Starts a gateway of two shards and two workers. Prints what it does, then tables; the exit code is
1 if anything did not hold.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import grpc

from engine.models import resolve_model
from tests.bench.machine import Machine
from tests.chaos.blow import FEWEST_OF_EACH, BlowKind, plan
from tests.chaos.census import Census
from tests.chaos.load import TOKENS, Load
from tests.chaos.report import Report
from tests.chaos.storm import Storm
from tests.chaos.verdict import judge_blows, judge_calls, judge_censuses, judge_gauges
from tests.e2e.gateway_process import GatewayProcess, gateway_process
from tests.tiny_adapter import write_tiny_adapter

ADAPTERS = 6
CLIENTS = 6
STALL_TIMEOUT_S = 10
END_TIMEOUT_S = 60.0


def main() -> int:
    """Entry of the command; the exit code."""
    options = _options()
    seed = random.SystemRandom().randrange(10_000) if options.seed is None else options.seed
    _say(f"seed {seed}")
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        report = _storm(options.keep or Path(folder), options.blows, seed)
    print(report.text())
    return 1 if report.findings else 0


def _storm(folder: Path, count: int, seed: int) -> Report:
    machine, began_s = Machine.here(), time.monotonic()
    model = resolve_model("tiny", folder / "models")
    adapters = {
        f"tale-{number}": write_tiny_adapter(folder / f"tale-{number}", model, seed=number, rank=8)
        for number in range(1, ADAPTERS + 1)
    }
    flags = ["--shards", "2", "--engine-stall-timeout-s", f"{STALL_TIMEOUT_S}"]
    _say("starting a gateway of two shards")
    with gateway_process(folder, workers=2, adapters=adapters, extra=flags) as gateway:
        load = Load(gateway.address, ["", *adapters], CLIENTS)
        chance = random.Random(seed)
        storm = Storm(gateway, load, chance, _say)
        findings = asyncio.run(_run(storm, load, plan(count, chance)))
        findings += _end(gateway)
    return Report(machine, seed, time.monotonic() - began_s, load.calls, storm.blows, findings)


async def _run(storm: Storm, load: Load, kinds: Sequence[BlowKind]) -> list[str]:
    """All blows; returns what did not hold."""
    golden = await _golden(load)
    async with load.running():
        await asyncio.sleep(3.0)  # what is opened with the first calls is no leak
    await storm.count()
    for kind in kinds:
        await storm.strike(kind)
        if storm.blows[-1].whole_s is None:
            break  # the next would hit what is not there
    async with load.running():
        await asyncio.sleep(3.0)  # in peace: none may fail
    await storm.count()
    return [
        *judge_blows(storm.blows),
        *judge_calls(load.calls, storm.blows, golden),
        *judge_censuses(storm.censuses),
        *judge_gauges(storm.gauges()),
    ]


async def _golden(load: Load) -> dict[tuple[str, int], str]:
    """What each adapter says at each length, asked before any blow."""
    found = {}
    async with grpc.aio.insecure_channel(load.address) as channel:
        for adapter in load.adapters:
            for tokens in TOKENS:
                call = await load.call(channel, adapter, tokens, stream=False)
                found[adapter, tokens] = call.text
    return found


def _end(gateway: GatewayProcess) -> list[str]:
    """End it as an operator does; returns what is left of it, or how it ended if not with 0."""
    gateway.signal(signal.SIGTERM)
    code = gateway.wait_exit(END_TIMEOUT_S)
    strays = [f"left behind: {stray}" for stray in Census.strays_of(gateway.process.pid)]
    return [f"the gateway ended with {code}"] * bool(code) + strays


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    fewest = FEWEST_OF_EACH * len(BlowKind)
    parser.add_argument("--blows", type=int, default=10, help=f"how many; at least {fewest}")
    parser.add_argument("--seed", type=int, help="of an earlier run: the same blows again")
    parser.add_argument("--keep", type=Path, help="an empty folder for logs and state")
    options = parser.parse_args()
    if options.blows < fewest:
        parser.error(f"--blows is at least {fewest}")
    return options


def _say(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
