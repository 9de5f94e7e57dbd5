"""Twenty adapters on four places: each answers as if it were alone, to the token."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import Counter
from pathlib import Path

import grpc
import psutil
import pytest

from lora_gateway.v1 import adapters_pb2, inference_pb2
from lora_gateway.v1.adapters_pb2_grpc import AdaptersStub
from lora_gateway.v1.inference_pb2_grpc import InferenceStub
from tests.e2e.gateway_process import GatewayProcess

ADAPTERS = tuple(f"tenant-{seed:02}" for seed in range(1, 21))
BASE_MODEL = ""
PLACES = 4
PROMPTS = (
    "Once upon a time",
    "The river runs to the sea and",
    "def main():",
    "Dear customer, thank you for your letter of",
)
TOKENS = 16
IN_FLIGHT = 24
TIMEOUT_S = 120.0

Question = tuple[str, str]
"""Adapter and prompt."""


def request(question: Question) -> inference_pb2.GenerateRequest:
    adapter, prompt = question
    return inference_pb2.GenerateRequest(
        adapter=adapter,
        text=prompt,
        sampling=inference_pb2.SamplingParams(max_tokens=TOKENS, temperature=0, ignore_eos=True),
        return_token_ids=True,
    )


async def answer(channel: grpc.aio.Channel, question: Question) -> list[int]:
    """Tokens of a unary answer."""
    whole = await InferenceStub(channel).Generate(request(question), timeout=TIMEOUT_S)
    assert whole.served_by.adapter == question[0]
    return list(whole.completions[0].token_ids)


async def streamed_answer(channel: grpc.aio.Channel, question: Question) -> list[int]:
    """Tokens of a streamed answer, which must come to its end."""
    tokens, kinds = list[int](), list[str | None]()
    call = InferenceStub(channel).GenerateStream(request(question), timeout=TIMEOUT_S)
    async for event in call:
        kinds.append(event.WhichOneof("event"))
        if kinds == ["started"]:
            assert event.started.served_by.adapter == question[0]
        tokens.extend(event.delta.token_ids)
    assert (kinds[0], kinds[-1]) == ("started", "finished")
    return tokens


def core_pid(gateway: GatewayProcess) -> int:
    """Process id of the engine core, of which there is one."""
    (core,) = [
        process
        for process in gateway.family()
        if "EngineCore" in process.name() or "EngineCore" in " ".join(process.cmdline())
    ]
    return core.pid


def established(pid: int) -> int:
    connections = psutil.Process(pid).net_connections()
    return sum(c.status == psutil.CONN_ESTABLISHED for c in connections)


def mixed_questions(requests: int) -> list[Question]:
    """What is asked: a few adapters very often, all of them sometimes, the base model among them.

    The n-th most popular gets a share of 1/n, as callers of many tenants do (Zipf's law).
    """
    rng = random.Random(20)
    models = [*ADAPTERS, BASE_MODEL]
    rng.shuffle(models)
    shares = [1 / place for place in range(1, len(models) + 1)]
    chosen = rng.choices(models, shares, k=requests)
    return [(model, rng.choice(PROMPTS)) for model in chosen]


async def create(channel: grpc.aio.Channel, adapter: str, source: Path) -> None:
    created = await AdaptersStub(channel).CreateAdapterVersion(
        adapters_pb2.CreateAdapterVersionRequest(
            adapter=adapter, source_uri=str(source), wait=True
        ),
        timeout=TIMEOUT_S,
    )
    assert created.adapter_version.state == adapters_pb2.VERSION_STATE_READY


@pytest.mark.timeout(600)
@pytest.mark.parametrize("requests", [300, pytest.param(1000, marks=pytest.mark.slow)])
async def test_isolation_under_mixed_load(
    requests: int, scarce: GatewayProcess, sources: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async with grpc.aio.insecure_channel(scarce.address) as channel:
        await mix(requests, scarce, channel, sources, capsys)


async def mix(
    requests: int,
    gateway: GatewayProcess,
    channel: grpc.aio.Channel,
    sources: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    core = core_pid(gateway)
    for number, name in enumerate(ADAPTERS, start=1):
        await create(channel, name, sources / str(number))
    alone = {
        (model, prompt): await answer(channel, (model, prompt))
        for model in (BASE_MODEL, *ADAPTERS)
        for prompt in PROMPTS
    }
    for prompt in PROMPTS:  # else an answer of another adapter could pass
        assert len({tuple(alone[model, prompt]) for model in (BASE_MODEL, *ADAPTERS)}) == 21

    loads_before = sum(gateway.metrics("adapter_load_seconds_count", phase="all", result="ok"))
    questions = iter(mixed_questions(requests))
    asked: Counter[str] = Counter()
    wrong: list[tuple[Question, list[int]]] = []

    async def keep_asking(number: int, channel: grpc.aio.Channel) -> None:
        """Every other task streams."""
        ask = streamed_answer if number % 2 else answer
        for question in questions:  # shared: each is taken once
            tokens = await ask(channel, question)
            asked[question[0]] += 1
            if tokens != alone[question]:
                wrong.append((question, tokens))

    async with contextlib.AsyncExitStack() as stack:
        options = [("grpc.use_local_subchannel_pool", 1)]
        channels = [
            await stack.enter_async_context(
                grpc.aio.insecure_channel(gateway.address, options=options)
            )
            for _ in range(IN_FLIGHT)
        ]
        await asyncio.gather(*(channel.channel_ready() for channel in channels))
        held = [established(pid) for pid in gateway.serving_workers()]
        assert len(held) == 2 and min(held) > 0, "the kernel gave connections to both workers"
        async with asyncio.TaskGroup() as tasks:
            for number in range(IN_FLIGHT):
                tasks.create_task(keep_asking(number, channels[number]))

    loads = (
        sum(gateway.metrics("adapter_load_seconds_count", phase="all", result="ok")) - loads_before
    )
    with capsys.disabled():
        print(
            f"\nisolation: {asked.total()} requests to {len(asked) - 1} adapters and the base "
            f"model ({asked.most_common(1)[0][1]} to the most popular, {min(asked.values())} to "
            f"the least), {len(wrong)} wrong, {loads:.0f} loads on {PLACES} places"
        )
    assert not wrong
    assert asked.total() == requests and set(asked) == {BASE_MODEL, *ADAPTERS}
    assert loads > len(ADAPTERS), "the places were fought over"
    assert core_pid(gateway) == core, "the engine lived through it"
