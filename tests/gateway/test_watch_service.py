"""Watching on the wire: replay, follow, heartbeats, and the trail of who changed what."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from prometheus_client import REGISTRY

from engine import ledger
from gateway import adapters
from gateway.admission import Draining
from lora_gateway.v1 import adapters_pb2 as pb
from tests.gateway.control_plane import TIMEOUT_S, Plane, control_plane, create, named
from tests.gateway.promises import refused

CREATED, READY = pb.EVENT_KIND_VERSION_CREATED, pb.EVENT_KIND_VERSION_READY
TRAFFIC = pb.EVENT_KIND_TRAFFIC_SET


@pytest_asyncio.fixture
async def plane(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Plane]:
    async with control_plane(tmp_path, monkeypatch) as plane:
        yield plane


def watching(plane: Plane, after: int | None = None, adapter: str = "") -> Any:
    request = pb.WatchAdaptersRequest(after_sequence=after, adapter=adapter)
    return plane.stub.WatchAdapters(request)


async def read(watch: Any) -> pb.WatchAdaptersResponse:
    async with asyncio.timeout(TIMEOUT_S):
        message: pb.WatchAdaptersResponse = await watch.read()
    return message


async def events(watch: Any, count: int) -> list[pb.AdapterEvent]:
    """So many events, whatever heartbeats come between."""
    found: list[pb.AdapterEvent] = []
    while len(found) < count:
        message = await read(watch)
        if message.WhichOneof("item") == "event":
            found.append(message.event)
    return found


def who(actor: str) -> str:
    """The actor, but for the port of one who has no certificate."""
    return "caller" if actor.startswith("ipv4:127.0.0.1:") else actor


async def test_all_changes_are_replayed_in_order_with_who_made_them(plane: Plane) -> None:
    await plane.ready()
    await plane.ready()
    await plane.stub.PromoteVersion(named(pb.PromoteVersionRequest, version=2))
    await plane.stub.RollbackAdapter(pb.RollbackAdapterRequest(adapter="sql"))
    await plane.stub.DeleteAdapterVersion(named(pb.DeleteAdapterVersionRequest, version=2))
    request = create(plane.write_source("bad", findings=["no weights"]), wait=True)
    await refused(plane.stub.CreateAdapterVersion(request))
    watch = watching(plane, after=0)
    assert (await read(watch)).heartbeat.sequence == 0
    told = await events(watch, 11)
    assert [event.sequence for event in told] == list(range(1, 12))
    assert [
        (pb.EventKind.Name(event.kind)[11:], event.version, who(event.actor)) for event in told
    ] == [
        ("VERSION_CREATED", 1, "caller"),
        ("VERSION_READY", 1, "gateway"),
        ("TRAFFIC_SET", 0, "gateway"),
        ("VERSION_CREATED", 2, "caller"),
        ("VERSION_READY", 2, "gateway"),
        ("VERSION_PROMOTED", 0, "caller"),
        ("ADAPTER_ROLLED_BACK", 0, "caller"),
        ("VERSION_DRAINING", 2, "caller"),
        ("VERSION_DELETED", 2, "gateway"),
        ("VERSION_CREATED", 3, "caller"),
        ("VERSION_FAILED", 3, "gateway"),
    ]
    assert told[-1].reason == "no weights"
    assert [arm.version for arm in told[5].splits] == [2]
    assert [arm.version for arm in told[6].splits] == [1]
    times = [event.time.ToNanoseconds() for event in told]
    assert times == sorted(times)


async def test_a_watch_follows_from_where_the_caller_stopped(plane: Plane) -> None:
    await plane.ready()
    first = watching(plane, after=0)
    (created,) = await events(first, 1)
    first.cancel()
    second = watching(plane, after=created.sequence)
    assert (await read(second)).heartbeat.sequence == created.sequence
    assert [event.kind for event in await events(second, 2)] == [READY, TRAFFIC]
    waiting = asyncio.ensure_future(events(second, 2))
    await plane.ready()
    assert [event.kind for event in await waiting] == [CREATED, READY]


async def test_without_a_sequence_only_what_is_new_comes(plane: Plane) -> None:
    await plane.ready()
    newest = await plane.registry.last_sequence()
    watch = watching(plane)
    assert (await read(watch)).heartbeat.sequence == newest
    await plane.ready()
    assert [event.sequence for event in await events(watch, 2)] == [newest + 1, newest + 2]


async def test_one_adapter_can_be_watched_alone(plane: Plane) -> None:
    await plane.ready("other")
    await plane.ready("sql")
    watch = watching(plane, after=0, adapter="sql")
    assert {event.adapter for event in await events(watch, 3)} == {"sql"}
    await plane.ready("other")
    await plane.ready("sql")
    assert {event.adapter for event in await events(watch, 2)} == {"sql"}


async def test_a_replay_longer_than_one_read_has_no_gap(
    plane: Plane, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger, "EVENTS_PER_READ", 4)
    for _ in range(5):
        await plane.ready()
    count = await plane.registry.last_sequence()
    watch = watching(plane, after=0)
    told = [event.sequence for event in await events(watch, count)]
    assert told == list(range(1, count + 1))


async def test_changes_while_a_watch_replays_come_once_and_in_order(plane: Plane) -> None:
    await plane.ready()
    watches = [watching(plane, after=0) for _ in range(4)]
    following = [asyncio.ensure_future(events(watch, 13)) for watch in watches]
    for _ in range(5):
        await plane.ready()
    for told in await asyncio.gather(*following):
        assert [event.sequence for event in told] == list(range(1, 14))


async def test_a_quiet_watch_says_that_it_lives_and_has_missed_nothing(
    plane: Plane, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapters, "HEARTBEAT_S", 0.1)
    watch = watching(plane, adapter="sql")
    assert (await read(watch)).heartbeat.sequence == 0
    await plane.ready("other")
    newest = await plane.registry.last_sequence()
    async with asyncio.timeout(TIMEOUT_S):
        while (await read(watch)).heartbeat.sequence != newest:
            pass
    resumed = watching(plane, after=newest, adapter="sql")
    assert (await read(resumed)).heartbeat.sequence == newest


async def test_a_sequence_of_another_state_folder_is_refused(plane: Plane) -> None:
    await plane.ready()
    newest = await plane.registry.last_sequence()
    refusal = await refused(watching(plane, after=newest + 1).read())
    assert refusal.reason == "SEQUENCE_UNKNOWN"
    assert refusal.metadata == {"sequence": str(newest)}
    assert (await read(watching(plane, after=newest))).heartbeat.sequence == newest


async def test_a_watch_of_what_is_no_name_is_refused(plane: Plane) -> None:
    refusal = await refused(watching(plane, adapter="Not A Name").read())
    assert (refusal.reason, refusal.fields) == ("INVALID_FIELD", ["adapter"])


async def test_no_default_deadline_ends_a_watch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapters, "HEARTBEAT_S", 0.05)
    async with control_plane(tmp_path, monkeypatch, default_stream_deadline_s=0.1) as plane:
        watch = watching(plane)
        begin_s = asyncio.get_running_loop().time()
        while asyncio.get_running_loop().time() - begin_s < 0.5:
            await read(watch)


async def test_a_drain_of_the_worker_and_the_end_of_the_host_tell_watchers_to_come_back(
    plane: Plane,
) -> None:
    for end in (
        lambda: plane.gateway.admission.cut_all(Draining()),
        lambda: asyncio.ensure_future(plane.control.close()),
    ):
        watch = watching(plane)
        await read(watch)
        ending = end()
        assert (await refused(watch.read())).reason == "DRAINING"
    assert ending is not None
    await ending


async def test_watchers_who_left_are_forgotten(plane: Plane) -> None:
    watches = [watching(plane) for _ in range(20)]
    for watch in watches:
        await read(watch)
    assert len(plane.gateway.admission.calls) == 20
    for watch in watches:
        watch.cancel()
    assert await plane.gateway.admission.wait_idle(TIMEOUT_S)


async def test_a_call_that_a_worker_passes_on_counts_once_as_running(plane: Plane) -> None:
    """Worker and host are one process here, and of a gateway they are added up."""

    def running() -> float:
        return REGISTRY.get_sample_value("gateway_inflight_calls") or 0.0

    before = running()
    await plane.ready()
    assert running() == before
    watch = watching(plane, 0)
    assert (await read(watch)).HasField("heartbeat"), "the host answers"
    assert running() == before + 1
    watch.cancel()
    async with asyncio.timeout(TIMEOUT_S):
        while running() != before:
            await asyncio.sleep(0.01)
