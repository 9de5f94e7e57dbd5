"""The control plane's slots: what workers say is heard, the host's own requests take turns too."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from pathlib import Path

import pytest
import pytest_asyncio
from prometheus_client import REGISTRY

from engine import evaluation
from engine.generation import GenerationRequest, Output, ServedVersion, VersionKey
from engine.pool import Lease
from engine.rendering import RenderedPrompt
from gateway.messages import WaitsForSlot, WentIdle
from gateway.shards import Shards
from lora_gateway.v1 import adapters_pb2 as pb
from tests.gateway.control_plane import (
    KILLED,
    TENANT,
    TIMEOUT_S,
    LoadableShard,
    Plane,
    control_plane,
    named,
)

SHARD = "shard-0"
ONE, TWO, THREE = (VersionKey(TENANT, "sql", version) for version in (1, 2, 3))
WORKER, OTHER = 71, 72
"""Process ids."""


@pytest_asyncio.fixture
async def plane(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Plane]:
    """With READY versions 1 to 3 of `sql`, and one slot."""
    async with control_plane(tmp_path, monkeypatch, max_loras=1, max_cpu_loras=4) as plane:
        for _ in range(3):
            await plane.ready()
        yield plane


def shards(plane: Plane) -> Shards:
    assert plane.control._shards is not None
    return plane.control._shards


def lease(plane: Plane, key: VersionKey) -> Lease:
    return shards(plane).pool.route_to(key).lease()


def waits(plane: Plane, key: VersionKey, process: int = WORKER, waits: bool = True) -> None:
    plane.control.hear(WaitsForSlot(SHARD, key, process, waits))


async def until_granted(plane: Plane, *keys: VersionKey) -> None:
    async with asyncio.timeout(TIMEOUT_S):
        while plane.control.granted[SHARD] != [*keys]:
            await asyncio.sleep(0.01)


def waiting_metric() -> float | None:
    return REGISTRY.get_sample_value("gateway_slot_waiting", {"shard": SHARD})


def waited_metric() -> float:
    return REGISTRY.get_sample_value("gateway_slot_wait_seconds_count", {"shard": SHARD}) or 0.0


async def test_a_version_that_a_worker_waits_for_gets_the_slot_when_the_hosts_own_has_ended(
    plane: Plane,
) -> None:
    async with lease(plane, ONE):
        await until_granted(plane, ONE)
        waits(plane, TWO)
        waits(plane, THREE)
        assert waiting_metric() == 2
        await until_granted(plane)
    await until_granted(plane, THREE)  # nobody runs on TWO: it was idle, and gave its slot on
    assert waiting_metric() == 0


async def test_who_gives_up_and_who_dies_waits_no_more(plane: Plane) -> None:
    async with lease(plane, ONE):
        waits(plane, TWO)
        waits(plane, THREE, OTHER)
        waits(plane, TWO, waits=False)
        assert waiting_metric() == 1
        plane.control.forget_worker(OTHER)
        assert waiting_metric() == 0


async def test_the_hosts_own_requests_wait_for_their_turn(plane: Plane) -> None:
    before = waited_metric()
    first = lease(plane, ONE)
    await first.__aenter__()
    second = asyncio.create_task(lease(plane, TWO).__aenter__())
    await until_granted(plane)  # recalled from the first one
    assert not second.done()
    await first.__aexit__(None, None, None)
    async with asyncio.timeout(TIMEOUT_S):
        assert (await second) is not None
    assert waited_metric() > before


async def test_a_worker_that_says_that_one_is_idle_is_heard(plane: Plane) -> None:
    slots = shards(plane).slots[SHARD]
    looked: list[str] = []
    slots.look = lambda: looked.append("looked")  # type: ignore[method-assign]
    plane.control.hear(WentIdle(SHARD))
    assert looked == ["looked"]


async def test_an_unloaded_version_has_no_slot(plane: Plane) -> None:
    async with lease(plane, THREE):
        await until_granted(plane, THREE)
    request = named(pb.UnloadAdapterVersionRequest, version=3)
    await plane.stub.UnloadAdapterVersion(request, timeout=TIMEOUT_S)
    assert plane.control.granted[SHARD] == []


async def test_a_shard_that_dies_loses_its_slots_and_who_speaks_of_it_is_not_heard(
    plane: Plane,
) -> None:
    async with lease(plane, ONE):
        waits(plane, TWO)
        plane.control.lose(SHARD, KILLED)
        assert plane.control.granted == {}
        assert waiting_metric() == 0
        waits(plane, TWO)
        plane.control.hear(WentIdle(SHARD))
        plane.control.forget_worker(WORKER)
        assert not shards(plane).are_slots_contended(SHARD)


# --- evaluations -------------------------------------------------------------


def evaluation_of(*versions: int, examples: int) -> pb.EvaluateVersionRequest:
    example = pb.EvaluationExample(text="one two", expected="0 1 ")
    return pb.EvaluateVersionRequest(
        adapter="sql",
        versions=versions,
        examples=[example] * examples,
        max_tokens=2,
        max_concurrency=8,
    )


async def test_versions_are_compared_also_where_only_one_runs_at_a_time(
    plane: Plane, monkeypatch: pytest.MonkeyPatch
) -> None:
    running: list[int] = []
    most = 0
    generate = LoadableShard.generate

    async def watched(
        self: LoadableShard,
        request: GenerationRequest,
        prompt: RenderedPrompt,
        version: ServedVersion | None,
    ) -> AsyncGenerator[Output, None]:
        nonlocal most
        number = 0 if version is None else version.version
        running.append(number)
        most = max(most, len(set(running) - {0}))
        try:
            async with aclosing(generate(self, request, prompt, version)) as outputs:
                async for output in outputs:
                    yield output
        finally:
            running.remove(number)

    monkeypatch.setattr(LoadableShard, "generate", watched)
    call = plane.stub.EvaluateVersion(evaluation_of(0, 1, 2, 3, examples=4), timeout=60)
    events = [event async for event in call]
    assert events[-1].WhichOneof("event") == "summary"
    assert events[-1].summary.failed_count == 0
    assert most == 1


async def test_an_evaluation_stays_back_while_versions_wait_for_their_turn(
    plane: Plane, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "POLL_INTERVAL_S", 0.01)
    async with lease(plane, ONE):
        waits(plane, TWO)
        call = plane.stub.EvaluateVersion(evaluation_of(0, examples=1), timeout=60)
        first = asyncio.ensure_future(call.read())
        assert not (await asyncio.wait([first], timeout=0.2))[0]
        assert not plane.shard.running
    await first
