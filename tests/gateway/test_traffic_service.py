"""Splits on the wire: set, promoted and rolled back, by etag, and by the guard itself."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from engine.core_death import CoreDeath
from engine.errors import GenerationFailed
from engine.fingerprint import Tagged
from engine.generation import VersionKey
from engine.step_record import Steps
from gateway import judgement
from gateway.messages import Ended
from lora_gateway.v1 import adapters_pb2 as pb
from tests.gateway.control_plane import TENANT, TIMEOUT_S, Plane, control_plane, named
from tests.gateway.outcomes import failure, outcome
from tests.gateway.promises import refused

FAST_S = 0.02


@pytest_asyncio.fixture
async def plane(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Plane]:
    """With READY versions 1, which has the traffic, to 3 of `sql`."""
    monkeypatch.setattr(judgement, "GUARD_INTERVAL_S", FAST_S)
    async with control_plane(tmp_path, monkeypatch) as plane:
        for _ in range(3):
            await plane.ready()
        yield plane


def split(*arms: tuple[int, int], **fields: Any) -> pb.SetTrafficRequest:
    splits = [pb.TrafficSplit(version=version, weight=weight) for version, weight in arms]
    return pb.SetTrafficRequest(adapter="sql", splits=splits, **fields)


def arms_of(adapter: pb.Adapter) -> dict[int, int]:
    """Weights by version."""
    return {arm.version: arm.weight for arm in adapter.splits}


async def adapter_of(plane: Plane) -> pb.Adapter:
    adapter: pb.Adapter
    adapter = (await plane.stub.GetAdapter(pb.GetAdapterRequest(adapter="sql"))).adapter
    return adapter


def end(plane: Plane, version: int, count: int, **fields: Any) -> None:
    """A worker tells that so many requests ended, badly unless `fields` say otherwise."""
    make = outcome if "code" in fields else failure
    fields |= {"adapter": "sql", "version": version, "end_s": time.time()}
    ended = [make(request_id=uuid.uuid4().hex, **fields) for _ in range(count)]
    plane.control.hear(Ended(ended))


async def test_a_split_is_set_promoted_and_rolled_back(plane: Plane) -> None:
    told = (await plane.stub.SetTraffic(split((3, 10), (1, 90)))).adapter
    assert arms_of(told) == {1: 90, 3: 10}
    version = await plane.stub.GetAdapterVersion(named(pb.GetAdapterVersionRequest, version=3))
    assert version.adapter_version.weight == 10
    told = (await plane.stub.PromoteVersion(named(pb.PromoteVersionRequest, version=3))).adapter
    assert arms_of(told) == {3: 100}
    back = pb.RollbackAdapterRequest(adapter="sql")
    assert arms_of((await plane.stub.RollbackAdapter(back)).adapter) == {1: 90, 3: 10}
    assert arms_of((await plane.stub.RollbackAdapter(back)).adapter) == {1: 100}
    assert (await refused(plane.stub.RollbackAdapter(back))).reason == "NOTHING_TO_ROLL_BACK"
    assert arms_of((await plane.stub.SetTraffic(split())).adapter) == {}


async def test_only_one_of_many_that_saw_the_same_etag_acts(plane: Plane) -> None:
    seen = (await adapter_of(plane)).etag
    calls = [
        plane.stub.PromoteVersion(
            pb.PromoteVersionRequest(adapter="sql", version=version, etag=seen)
        )
        for version in (1, 2, 3, 2, 3)
    ]
    ends = await asyncio.gather(*calls, return_exceptions=True)
    winners = [answer for answer in ends if isinstance(answer, pb.PromoteVersionResponse)]
    assert len(winners) == 1
    assert await adapter_of(plane) == winners[0].adapter
    assert winners[0].adapter.etag != seen
    for call in (
        plane.stub.SetTraffic(split((1, 1), etag=seen)),
        plane.stub.RollbackAdapter(pb.RollbackAdapterRequest(adapter="sql", etag=seen)),
    ):
        refusal = await refused(call)
        assert refusal.reason == "ETAG_MISMATCH"
        assert refusal.metadata == {"adapter": "sql", "etag": winners[0].adapter.etag}


async def test_versions_are_loaded_before_they_get_traffic(plane: Plane) -> None:
    await plane.stub.UnloadAdapterVersion(named(pb.UnloadAdapterVersionRequest, version=2))
    plane.shard.may_load.clear()
    setting = asyncio.ensure_future(plane.stub.SetTraffic(split((1, 1), (2, 1))))
    assert not (await asyncio.wait([setting], timeout=0.1))[0]
    assert arms_of(await adapter_of(plane)) == {1: 100}
    plane.shard.may_load.set()
    assert arms_of((await setting).adapter) == {1: 1, 2: 1}


async def test_a_version_that_cannot_be_loaded_gets_none(plane: Plane) -> None:
    await plane.stub.UnloadAdapterVersion(named(pb.UnloadAdapterVersionRequest, version=2))
    plane.shard.refuses[VersionKey(TENANT, "sql", 2)] = GenerationFailed("out of memory")
    refusal = await refused(plane.stub.SetTraffic(split((1, 1), (2, 1))))
    assert refusal.reason == "ADAPTER_LOAD_FAILED"
    assert refusal.metadata == {"adapter": "sql", "version": "2"}
    assert arms_of(await adapter_of(plane)) == {1: 100}


async def test_what_is_wrong_with_a_split_is_told_at_once(plane: Plane) -> None:
    guard = pb.TrafficGuard(version=3, max_error_ratio=2)
    refusal = await refused(plane.stub.SetTraffic(split((0, 1), (1, 0), guard=guard)))
    assert refusal.reason == "INVALID_FIELD"
    assert refusal.fields == [
        *("splits[0].version", "splits[1].weight", "guard.version", "guard.max_error_ratio")
    ]


# --- the guard ---------------------------------------------------------------


async def until_rolled_back(plane: Plane, after: int) -> pb.AdapterEvent:
    """The event of the rollback."""
    watch = plane.stub.WatchAdapters(pb.WatchAdaptersRequest(after_sequence=after))
    async with asyncio.timeout(TIMEOUT_S):
        async for message in watch:
            if message.event.kind == pb.EVENT_KIND_ADAPTER_ROLLED_BACK:
                watch.cancel()
                event: pb.AdapterEvent = message.event
                return event
    raise AssertionError("the watch ended")


async def test_the_guard_rolls_a_bad_split_back_by_itself(plane: Plane) -> None:
    guard = pb.TrafficGuard(version=2, min_requests=20, max_error_ratio=0.5)
    begin = await plane.registry.last_sequence()
    told = (await plane.stub.SetTraffic(split((1, 50), (2, 50), guard=guard))).adapter
    assert told.guard == guard
    end(plane, 2, 19)
    end(plane, 1, 100)
    await asyncio.sleep(5 * FAST_S)
    assert arms_of(await adapter_of(plane)) == {1: 50, 2: 50}, "19 requests are not judged"
    end(plane, 2, 1)
    event = await until_rolled_back(plane, begin)
    assert event.actor == "guard"
    assert "error ratio 1 of 20 requests is over 0.5" in event.reason
    assert [arm.version for arm in event.splits] == [1]
    adapter = await adapter_of(plane)
    assert arms_of(adapter) == {1: 100}
    assert not adapter.HasField("guard")


async def test_the_guard_rolls_a_split_back_whose_new_version_is_quarantined(plane: Plane) -> None:
    guard = pb.TrafficGuard(version=2, min_requests=20, max_error_ratio=0.5)
    begin = await plane.registry.last_sequence()
    await plane.stub.SetTraffic(split((1, 50), (2, 50), guard=guard))
    for request in (Tagged("a", 1), Tagged("b", 2)):
        steps = Steps(fresh=frozenset({request}), versions=frozenset({"default/sql@2"}))
        plane.control.crashes.judge("shard-0", CoreDeath("killed by SIGSEGV", True, steps))
    event = await until_rolled_back(plane, begin)
    assert event.reason == "an engine crashed twice on its requests, and it is quarantined"
    assert arms_of(await adapter_of(plane)) == {1: 100}


async def test_the_guard_leaves_a_good_split_alone(plane: Plane) -> None:
    guard = pb.TrafficGuard(version=2, min_requests=1, max_error_ratio=0, max_ttft_p95_ms=1000)
    await plane.stub.SetTraffic(split((1, 50), (2, 50), guard=guard))
    end(plane, 2, 50, code="OK")
    end(plane, 2, 50, code="INVALID_ARGUMENT")
    await asyncio.sleep(5 * FAST_S)
    assert arms_of(await adapter_of(plane)) == {1: 50, 2: 50}


async def test_a_guard_watches_on_after_a_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(judgement, "GUARD_INTERVAL_S", FAST_S)
    guard = pb.TrafficGuard(version=2, min_requests=5, max_error_ratio=0)
    async with control_plane(tmp_path, monkeypatch) as plane:
        await plane.ready()
        await plane.ready()
        await plane.stub.SetTraffic(split((1, 50), (2, 50), guard=guard))
    async with control_plane(tmp_path, monkeypatch) as plane:
        begin = await plane.registry.last_sequence()
        end(plane, 2, 5)
        assert (await until_rolled_back(plane, begin)).actor == "guard"


async def test_a_guard_that_has_nothing_to_go_back_to_says_so_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(judgement, "GUARD_INTERVAL_S", FAST_S)
    async with control_plane(tmp_path, monkeypatch) as plane:
        await plane.ready(no_traffic=True)
        guard = pb.TrafficGuard(version=1, min_requests=1, max_error_ratio=0)
        await plane.stub.SetTraffic(split((1, 1), guard=guard))
        end(plane, 1, 5)
        await asyncio.sleep(10 * FAST_S)
        assert caplog.text.count("cannot be rolled back") == 1
        assert arms_of(await adapter_of(plane)) == {1: 1}
