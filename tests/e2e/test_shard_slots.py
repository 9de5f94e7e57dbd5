"""Two adapters that keep a shard's two slots busy for ever, and a third one that gets its turn."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
import pytest
import pytest_asyncio

from lora_gateway.v1 import adapters_pb2, inference_pb2
from lora_gateway.v1.adapters_pb2_grpc import AdaptersStub
from lora_gateway.v1.inference_pb2_grpc import InferenceStub
from tests.e2e.gateway_process import GatewayProcess
from tests.e2e.shard_calls import OPTIONS

if TYPE_CHECKING:
    from lora_gateway.v1.inference_pb2_grpc import InferenceAsyncStub

BUSY = ("turns-1", "turns-2")
THIRD = "turns-3"
CALLERS = 8
"""Of each busy adapter, each with a stream at any time."""
PROMPT = "The river runs to the sea and"
FEWEST, MOST = 16, 64
"""Tokens of a stream. With equal lengths all would end at once, and leave the engine empty."""
TIMEOUT_S = 120.0
SLACK_S = 3.0
"""For what is not a stream: the messages between processes, and one answer."""


def request(adapter: str, tokens: int = MOST) -> inference_pb2.GenerateRequest:
    return inference_pb2.GenerateRequest(
        adapter=adapter,
        text=PROMPT,
        sampling=inference_pb2.SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True),
        return_token_ids=True,
    )


async def answer(address: str, adapter: str) -> list[int]:
    """Tokens of a unary answer, on a connection of its own."""
    async with grpc.aio.insecure_channel(address, options=OPTIONS) as channel:
        whole = await InferenceStub(channel).Generate(request(adapter), timeout=TIMEOUT_S)
        return list(whole.completions[0].token_ids)


class Crowd:
    """Callers that stream one adapter each, one answer after the other, until they are stopped."""

    def __init__(self, address: str, golden: Mapping[str, Sequence[int]]) -> None:
        self.answered: Counter[str] = Counter()
        self.wrong: list[tuple[str, list[int]]] = []
        self.broken: list[grpc.aio.AioRpcError] = []
        self.longest_s = 0.0
        """From a first token to the end."""
        self.all_run = asyncio.Event()
        """Set when every caller has had an answer."""
        self._address = address
        self._golden = golden
        self._random = random.Random(1)
        self._stopped = False
        self._answered_callers = 0

    async def call_often(self, adapter: str) -> None:
        async with grpc.aio.insecure_channel(self._address, options=OPTIONS) as channel:
            stub: InferenceAsyncStub = InferenceStub(channel)
            answers = 0
            while not self._stopped:
                try:
                    await self._stream(stub, adapter)
                except grpc.aio.AioRpcError as error:
                    self.broken.append(error)
                    await asyncio.sleep(0.1)
                answers += 1
                self._answered_callers += answers == 1
                if self._answered_callers == CALLERS * len(BUSY):
                    self.all_run.set()

    async def _stream(self, stub: InferenceAsyncStub, adapter: str) -> None:
        tokens: list[int] = []
        begin_s = 0.0
        asked = request(adapter, self._random.randint(FEWEST, MOST))
        async for event in stub.GenerateStream(asked, timeout=TIMEOUT_S):
            begin_s = begin_s or time.monotonic()
            tokens.extend(event.delta.token_ids)
        self.longest_s = max(self.longest_s, time.monotonic() - begin_s)
        self.answered[adapter] += 1
        if tokens != self._golden[adapter][: asked.sampling.max_tokens]:
            self.wrong.append((adapter, tokens))

    def stop(self) -> None:
        """Let the streams that run come to their end."""
        self._stopped = True


@pytest_asyncio.fixture(loop_scope="session")
async def golden(scarce: GatewayProcess, sources: Path) -> Mapping[str, Sequence[int]]:
    """What each adapter answers alone."""
    async with grpc.aio.insecure_channel(scarce.address) as channel:
        known = await AdaptersStub(channel).ListAdapters(adapters_pb2.ListAdaptersRequest())
        for number, name in enumerate((*BUSY, THIRD), start=11):
            if name not in {adapter.adapter for adapter in known.adapters}:
                create = adapters_pb2.CreateAdapterVersionRequest(
                    adapter=name, source_uri=str(sources / str(number)), wait=True
                )
                await AdaptersStub(channel).CreateAdapterVersion(create, timeout=TIMEOUT_S)
    golden = {name: await answer(scarce.address, name) for name in (*BUSY, THIRD)}
    assert len({tuple(tokens) for tokens in golden.values()}) == 3
    return golden


@contextlib.asynccontextmanager
async def crowd_of(
    gateway: GatewayProcess, golden: Mapping[str, Sequence[int]]
) -> AsyncIterator[Crowd]:
    """Both slots busy, with streams that all came to their end when the block ends."""
    crowd = Crowd(gateway.address, golden)
    async with asyncio.TaskGroup() as tasks:
        for adapter in BUSY * CALLERS:
            tasks.create_task(crowd.call_often(adapter))
        await crowd.all_run.wait()
        yield crowd
        crowd.stop()
    assert not crowd.wrong


async def deferred_until(gateway: GatewayProcess, done: asyncio.Event) -> list[float]:
    """How many requests vLLM itself keeps from its batch for their adapter, now and again."""
    seen: list[float] = []
    while not done.is_set():
        seen += await asyncio.to_thread(
            gateway.metrics, "vllm:num_requests_waiting_by_reason", reason="deferred"
        )
        await asyncio.sleep(0.02)
    return seen


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_shard_slots_are_shared_in_turns_and_nobody_starves(
    scarce: GatewayProcess,
    golden: Mapping[str, Sequence[int]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    waited_before = sum(scarce.metrics("gateway_slot_wait_seconds_count"))
    done = asyncio.Event()
    took_s: list[float] = []
    async with asyncio.TaskGroup() as tasks:
        watching = tasks.create_task(deferred_until(scarce, done))
        async with crowd_of(scarce, golden) as crowd:
            for _ in range(4):
                begin_s = time.monotonic()
                assert await answer(scarce.address, THIRD) == golden[THIRD]
                took_s.append(time.monotonic() - begin_s)
        done.set()
    waited = sum(scarce.metrics("gateway_slot_wait_seconds_count")) - waited_before
    with capsys.disabled():
        print(
            f"\nslots: 2 adapters with {CALLERS} callers each on 2 slots, streams of at most "
            f"{crowd.longest_s:.1f} s; a third one answered after "
            f"{', '.join(f'{seconds:.2f}' for seconds in took_s)} s; "
            f"{dict(crowd.answered)} answers, {waited:.0f} requests waited for a turn"
        )
    # Of the others one may wait before it: a turn of each is one stream's length, and so is this
    # answer itself.
    assert max(took_s) <= 3 * crowd.longest_s + SLACK_S
    assert not crowd.broken
    assert min(crowd.answered.values()) > CALLERS
    assert waited >= len(took_s)
    assert set(watching.result()) == {0.0}, "the engine never had to choose"
    assert sum(scarce.metrics("gateway_slot_waiting")) == 0


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_a_dead_worker_keeps_no_shard_slot(
    scarce: GatewayProcess, golden: Mapping[str, Sequence[int]]
) -> None:
    workers = scarce.serving_workers()
    deaths = sum(scarce.metrics("gateway_worker_deaths_total"))
    async with crowd_of(scarce, golden) as crowd:
        os.kill(workers[0], signal.SIGKILL)
        await asyncio.to_thread(
            scarce.wait_log, rf"aborted \d+ requests of worker {workers[0]}", TIMEOUT_S
        )
        before = Counter(crowd.answered)
        assert await answer(scarce.address, THIRD) == golden[THIRD]
        while any(crowd.answered[adapter] - before[adapter] < CALLERS for adapter in BUSY):
            await asyncio.sleep(0.05)
    assert crowd.broken, "its streams ended with it"
    assert sum(scarce.metrics("gateway_worker_deaths_total")) == deaths + 1
    for state, count in (("serving", 2), ("standby", 1)):  # as other tests expect them
        async with asyncio.timeout(TIMEOUT_S):
            while (
                sum(await asyncio.to_thread(scarce.metrics, "gateway_workers", state=state)) < count
            ):
                await asyncio.sleep(0.2)
