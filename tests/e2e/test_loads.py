"""Adapters are loaded all the time, and no answer of others is another one for it."""

from __future__ import annotations

import asyncio
from pathlib import Path

import grpc
import pytest

from lora_gateway.v1 import adapters_pb2
from lora_gateway.v1.adapters_pb2_grpc import AdaptersStub
from tests.e2e.gateway_process import GatewayProcess, gateway_process
from tests.e2e.test_isolation import BASE_MODEL, PROMPTS, TIMEOUT_S, answer, create, streamed_answer

COMING = ("coming-1", "coming-2")
STAYING = "staying"
ROUNDS = 6


async def reload(channel: grpc.aio.Channel, adapter: str) -> None:
    """Take it out of the engine, and load it again."""
    adapters = AdaptersStub(channel)
    unload = adapters_pb2.UnloadAdapterVersionRequest(adapter=adapter, version=1)
    await adapters.UnloadAdapterVersion(unload, timeout=TIMEOUT_S)
    load = adapters_pb2.LoadAdapterVersionRequest(adapter=adapter, version=1)
    await adapters.LoadAdapterVersion(load, timeout=TIMEOUT_S)


async def answers_under_loads(gateway: GatewayProcess, sources: Path) -> dict[tuple[str, str], int]:
    """Ask alone, and again and again while others load; how often each was asked then."""
    async with grpc.aio.insecure_channel(gateway.address) as channel:
        for number, adapter in enumerate((STAYING, *COMING), start=1):
            await create(channel, adapter, sources / f"{number}")
        questions = [(model, prompt) for model in (BASE_MODEL, STAYING) for prompt in PROMPTS]
        alone = {question: await answer(channel, question) for question in questions}
        asked = dict.fromkeys(questions, 0)
        done = asyncio.Event()

        async def keep_asking(question: tuple[str, str]) -> None:
            while not done.is_set():
                assert await streamed_answer(channel, question) == alone[question]
                asked[question] += 1

        async def keep_loading() -> None:
            try:
                for _ in range(ROUNDS):
                    for adapter in COMING:
                        await reload(channel, adapter)
            finally:
                done.set()

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(keep_loading())
            for question in questions:
                tasks.create_task(keep_asking(question))
    return asked


def loads(gateway: GatewayProcess, phase: str) -> float:
    return sum(gateway.metrics("adapter_load_seconds_count", phase=phase, result="ok"))


@pytest.mark.timeout(300)
async def test_loads_by_the_thread_change_no_answer(scarce: GatewayProcess, sources: Path) -> None:
    before = {phase: loads(scarce, phase) for phase in ("read", "commit", "all")}
    asked = await answers_under_loads(scarce, sources)
    assert min(asked.values()) >= 1
    counts = {phase: loads(scarce, phase) - count for phase, count in before.items()}
    assert counts["all"] >= ROUNDS * len(COMING)
    assert counts["read"] == counts["commit"] == counts["all"], "each was read by the thread"


@pytest.mark.slow
@pytest.mark.timeout(600)
async def test_loads_by_vllm_itself_change_none_either(sources: Path, tmp_path: Path) -> None:
    flags = ["--adapter-loader", "vllm", "--max-loras", "2", "--max-cpu-loras", "4"]
    flags += ["--adapter-source-allow", str(sources)]
    with gateway_process(tmp_path, workers=1, extra=flags) as gateway:
        asked = await answers_under_loads(gateway, sources)
        assert min(asked.values()) >= 1
        assert loads(gateway, "all") >= ROUNDS * len(COMING)
        assert loads(gateway, "read") == 0
