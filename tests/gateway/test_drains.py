"""A shard is drained and resumed: what is loaded where by then, and what is refused."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import pytest_asyncio

from engine.generation import Load
from engine.ring import AdapterKey, Ring, ShardState
from gateway import metrics
from gateway.messages import Want
from lora_gateway.v1 import adapters_pb2, admin_pb2
from tests.gateway.control_plane import KILLED, TENANT, TIMEOUT_S, Plane, control_plane, named
from tests.gateway.promises import refused
from tests.gateway.three_shards import (
    NAMES,
    drain,
    drains_of,
    hold,
    key_of,
    living_on,
    order,
    resume,
    shards,
)


@pytest_asyncio.fixture
async def plane(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Plane]:
    async with control_plane(tmp_path, monkeypatch, shards=3) as plane:
        yield plane


async def test_what_has_traffic_is_loaded_at_its_next_home_before_the_route_moves(
    plane: Plane,
) -> None:
    mine, other = living_on("shard-1", 3), living_on("shard-0")
    for adapter in (*mine, *other):
        await plane.ready(adapter)
    next_homes = {adapter: order(adapter)[1] for adapter in mine}
    for shard in plane.shards.values():
        shard.may_load.clear()
    draining = asyncio.create_task(drain(plane, "shard-1"))
    async with asyncio.timeout(TIMEOUT_S):
        await asyncio.wait(
            [
                asyncio.ensure_future(plane.shards[home].loading.wait())
                for home in set(next_homes.values())
            ],
            return_when=asyncio.FIRST_COMPLETED,
        )
    told = (await shards(plane))["shard-1"]
    assert told.drain.phase == admin_pb2.DRAIN_PHASE_MOVING and not told.drain.by_renewal
    assert (told.drain.versions_to_move, told.drain.versions_moved) == (3, 0)
    assert not plane.control.drained, "it takes requests until all is warm"
    for shard in plane.shards.values():
        shard.may_load.set()
    answer = await draining
    assert {(moved.adapter, moved.version, moved.shard) for moved in answer.moved} == {
        (adapter, 1, home) for adapter, home in next_homes.items()
    }
    assert not [moved.error for moved in answer.moved if moved.error]
    for adapter, home in next_homes.items():
        assert key_of(adapter) in plane.shards[home].loaded
    assert plane.control.drained == {"shard-1"}
    assert answer.shard.drain.phase == admin_pb2.DRAIN_PHASE_DRAINED
    assert metrics.shard_drained.labels("shard-1")._value.get() == 1
    assert set(plane.shards["shard-1"].loaded) == {key_of(adapter) for adapter in mine}


async def test_new_versions_and_loads_go_where_the_route_goes(plane: Plane) -> None:
    (adapter,) = living_on("shard-1")
    await plane.ready(adapter)
    await drain(plane, "shard-1")
    before = list(plane.shards["shard-1"].loaded)
    await plane.ready(adapter)
    await plane.stub.PromoteVersion(adapters_pb2.PromoteVersionRequest(adapter=adapter, version=2))
    assert plane.shards["shard-1"].loaded == before
    assert key_of(adapter, 2) in plane.shards[order(adapter)[1]].loaded


async def test_a_version_without_traffic_is_moved_if_it_was_used_lately(plane: Plane) -> None:
    named_by_someone, idle = living_on("shard-1", 2)
    for adapter in (named_by_someone, idle):
        await plane.ready(adapter, no_traffic=True)  # each was tried there
    later_s = time.monotonic() + 3600
    drains = drains_of(plane)
    resident = await hold(plane, "shard-1", key_of(named_by_someone))
    with pytest.MonkeyPatch.context() as patch:
        later = SimpleNamespace(monotonic=lambda: later_s, time=time.time)
        patch.setattr("gateway.drains.time", later)
        moves = await drains.drain("shard-1")
    assert [(move.key.adapter, move.error) for move in moves] == [(named_by_someone, "")]
    plane.control._shards._residents["shard-1"].release(resident)  # type: ignore[union-attr]


async def test_what_is_there_already_is_not_waited_for(plane: Plane) -> None:
    (adapter,) = living_on("shard-1")
    await plane.ready(adapter)
    plane.control.hear(Want(order(adapter)[1], key_of(adapter)))
    async with asyncio.timeout(TIMEOUT_S):
        while key_of(adapter) not in plane.shards[order(adapter)[1]].loaded:
            await asyncio.sleep(0.01)
    assert not (await drain(plane, "shard-1")).moved


async def test_what_comes_while_others_are_loaded_is_moved_too(plane: Plane) -> None:
    first, late = living_on("shard-1", 2)
    await plane.ready(first)
    for shard in plane.shards.values():
        shard.may_load.clear()
        shard.loading.clear()
    draining = asyncio.create_task(drain(plane, "shard-1"))
    await plane.shards[order(first)[1]].loading.wait()
    plane.shards["shard-1"].may_load.set()
    await plane.ready(late)  # the route has not moved
    assert plane.shards["shard-1"].loaded[-1] == key_of(late)
    for shard in plane.shards.values():
        shard.may_load.set()
    assert [moved.adapter for moved in (await draining).moved] == [first, late]


async def test_what_is_being_loaded_there_is_moved_too(plane: Plane) -> None:
    (adapter,) = living_on("shard-1")
    await plane.ready(adapter)
    request = named(adapters_pb2.UnloadAdapterVersionRequest, adapter)
    await plane.stub.UnloadAdapterVersion(request, timeout=TIMEOUT_S)
    shard = plane.shards["shard-1"]
    shard.may_load.clear()
    shard.loading.clear()
    plane.control.hear(Want("shard-1", key_of(adapter)))  # a call waits for it
    await shard.loading.wait()
    assert [moved.adapter for moved in (await drain(plane, "shard-1")).moved] == [adapter]
    shard.may_load.set()


async def test_a_version_that_cannot_be_loaded_elsewhere_does_not_hold_up_the_drain(
    plane: Plane,
) -> None:
    (adapter,) = living_on("shard-1")
    await plane.ready(adapter)
    plane.shards[order(adapter)[1]].refuses[key_of(adapter)] = RuntimeError("no")
    (moved,) = (await drain(plane, "shard-1")).moved
    assert "cannot be loaded" in moved.error
    assert plane.control.drained == {"shard-1"}


async def test_a_drain_does_not_put_out_what_is_used_more_lately(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with control_plane(
        tmp_path, monkeypatch, shards=2, max_loras=2, max_cpu_loras=3
    ) as plane:
        two = Ring(dict.fromkeys(NAMES[:2], ShardState.UP))
        homes = {f"a{n}": two.ranked(AdapterKey(TENANT, f"a{n}"))[0] for n in range(40)}
        mine = [name for name, home in homes.items() if home == "shard-1"][:3]
        theirs = [name for name, home in homes.items() if home == "shard-0"][:2]
        for adapter in (*mine, *theirs):
            await plane.ready(adapter)
        shards = plane.control._shards
        assert shards is not None
        for name, adapter in (
            *(("shard-0", theirs[0]), ("shard-1", mine[0])),
            *(("shard-1", mine[1]), ("shard-1", mine[2]), ("shard-0", theirs[1])),
        ):
            residents = shards._residents[name]
            residents.release(await residents.hold(key_of(adapter)))
        answer = await drain(plane, "shard-1")
        assert [moved.adapter for moved in answer.moved] == [mine[2], mine[1]]
        assert set(plane.shards["shard-0"].loaded) == {
            key_of(adapter) for adapter in (theirs[1], mine[1], mine[2])
        }


async def test_a_shard_that_is_resumed_has_what_lives_there_and_others_stood_in_for(
    plane: Plane,
) -> None:
    adapter, late, named_late = living_on("shard-1", 3)
    await plane.ready(adapter)
    await drain(plane, "shard-1")
    await plane.ready(late)
    await plane.ready(named_late, no_traffic=True)
    stand_in = order(named_late)[1]
    residents = plane.control._shards._residents[stand_in]  # type: ignore[union-attr]
    residents.release(await residents.hold(key_of(named_late)))
    shard = plane.shards["shard-1"]
    shard.may_load.clear()
    shard.loading.clear()
    resuming = asyncio.create_task(resume(plane, "shard-1"))
    await shard.loading.wait()
    assert plane.control.drained == {"shard-1"}, "not before it is warm"
    shard.may_load.set()
    assert not (await resuming).HasField("drain")
    assert set(shard.loaded) == {key_of(name) for name in (adapter, late, named_late)}
    assert not plane.control.drained
    assert metrics.shard_drained.labels("shard-1")._value.get() == 0


async def test_draining_and_resuming_again_changes_nothing(plane: Plane) -> None:
    await resume(plane, "shard-1")
    first = await drain(plane, "shard-1")
    again = await drain(plane, "shard-1")
    assert again.shard.drain.begin_time == first.shard.drain.begin_time
    await resume(plane, "shard-1")
    await resume(plane, "shard-1")
    assert not plane.control.drained


async def test_a_shard_that_is_not_there_is_not_found(plane: Plane) -> None:
    for call in (drain(plane, "shard-7"), resume(plane, "shard-7")):
        refusal = await refused(call)
        assert (refusal.reason, refusal.metadata) == ("SHARD_NOT_FOUND", {"shard": "shard-7"})
        assert "shard-0, shard-1, shard-2" in refusal.message
    for call in (drain(plane, ""), resume(plane, "")):
        assert (await refused(call)).fields == ["shard"]


async def test_the_last_open_shard_is_not_drained(plane: Plane) -> None:
    await drain(plane, "shard-0")
    plane.control.lose("shard-1", KILLED)
    refusal = await refused(drain(plane, "shard-2"))
    assert (refusal.reason, refusal.metadata) == ("LAST_OPEN_SHARD", {"shard": "shard-2"})
    assert "SIGTERM" in refusal.message
    assert plane.control.drained == {"shard-0"}
    assert not (await shards(plane))["shard-2"].HasField("drain")


async def test_the_last_that_will_be_open_is_not_drained_either(plane: Plane) -> None:
    await drain(plane, "shard-0")
    await drain(plane, "shard-1")
    plane.control.lose("shard-2", KILLED)
    assert (await refused(drain(plane, "shard-2"))).reason == "LAST_OPEN_SHARD"


async def test_two_drains_at_once_leave_a_shard(plane: Plane) -> None:
    (adapter,) = living_on("shard-1")
    await plane.ready(adapter)
    answers = await asyncio.gather(*(drain(plane, name) for name in NAMES), return_exceptions=True)
    assert sum(isinstance(answer, Exception) for answer in answers) == 1
    assert len(plane.control.drained) == 2


async def test_a_drain_is_given_up_if_the_others_die_meanwhile(plane: Plane) -> None:
    (adapter,) = living_on("shard-1")
    await plane.ready(adapter)
    home = plane.shards[order(adapter)[1]]
    home.may_load.clear()
    home.loading.clear()
    draining = asyncio.create_task(drain(plane, "shard-1"))
    await home.loading.wait()
    for name in ("shard-0", "shard-2"):
        plane.control.lose(name, KILLED)
    assert (await refused(draining)).reason == "LAST_OPEN_SHARD"
    assert not plane.control.drained
    assert not (await shards(plane))["shard-1"].HasField("drain")


async def test_if_the_next_home_dies_it_is_loaded_on_the_one_after(plane: Plane) -> None:
    (adapter,) = living_on("shard-1")
    await plane.ready(adapter)
    _, second, third = order(adapter)
    plane.shards[second].may_load.clear()
    plane.shards[second].loading.clear()
    draining = asyncio.create_task(drain(plane, "shard-1"))
    await plane.shards[second].loading.wait()
    plane.control.lose(second, KILLED)
    moved = (await draining).moved
    assert [(move.shard, bool(move.error)) for move in moved] == [(second, True), (third, False)]
    assert key_of(adapter) in plane.shards[third].loaded


async def test_who_leaves_before_the_route_moves_leaves_it_as_it_was(plane: Plane) -> None:
    (adapter,) = living_on("shard-1")
    await plane.ready(adapter)
    home = plane.shards[order(adapter)[1]]
    home.may_load.clear()
    home.loading.clear()
    draining = asyncio.create_task(drain(plane, "shard-1"))
    await home.loading.wait()
    draining.cancel()
    async with asyncio.timeout(TIMEOUT_S):
        while drains_of(plane).drain_of("shard-1") is not None:
            await asyncio.sleep(0.01)
    home.may_load.set()
    await drain(plane, "shard-2")
    assert plane.control.drained == {"shard-2"}


async def test_waiting_is_over_when_neither_processes_nor_core_have_anything(plane: Plane) -> None:
    pool = plane.control._shards.pool  # type: ignore[union-attr]
    route = next(
        route for route in iter(lambda: pool.route_to(None), None) if route.shard.name == "shard-0"
    )
    lease = route.lease()
    await lease.__aenter__()
    plane.shards["shard-0"].load_now = Load(0, 1, 0, 0.0)
    waiting = asyncio.create_task(drain(plane, "shard-0", wait=True))
    async with asyncio.timeout(TIMEOUT_S):
        while plane.control.drained != {"shard-0"}:
            await asyncio.sleep(0.01)
    assert (await shards(plane))["shard-0"].in_flight == 1
    assert not await drains_of(plane).is_idle("shard-0")
    await lease.__aexit__(None, None, None)
    assert not await drains_of(plane).is_idle("shard-0"), "the core has one in its queue"
    assert not waiting.done()
    plane.shards["shard-0"].load_now = Load(0, 0, 0, 0.0)
    assert (await waiting).shard.in_flight == 0
