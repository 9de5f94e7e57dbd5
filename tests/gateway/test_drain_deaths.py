"""Drains beside deaths of cores, the plan, and the gateway's own drains."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from engine.errors import ShardUnavailable
from engine.generation import Load
from engine.ring import AdapterKey, ShardState
from gateway.drains import Wish
from gateway.messages import Used
from lora_gateway.v1 import adapters_pb2
from tests.gateway.control_plane import KILLED, TENANT, TIMEOUT_S, Plane, control_plane, named
from tests.gateway.three_shards import (
    drain,
    drains_of,
    key_of,
    living_on,
    no_slot,
    order,
    resume,
    shards,
    states,
)


@pytest_asyncio.fixture
async def plane(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Plane]:
    async with control_plane(tmp_path, monkeypatch, shards=3) as plane:
        yield plane


async def test_a_drained_shard_comes_back_drained_and_cold_and_is_warm_once_it_is_resumed(
    plane: Plane,
) -> None:
    (adapter,) = living_on("shard-1")
    await plane.ready(adapter)
    await drain(plane, "shard-1")
    shard: Any = plane.shards["shard-1"]
    plane.control.lose("shard-1", KILLED)
    shard.loaded.clear()
    await plane.control.prepare(shard)
    await plane.control.admit("shard-1", no_slot)
    assert not shard.loaded and plane.control.drained == {"shard-1"}
    assert states(plane)["shard-1"] is ShardState.DRAINING
    await resume(plane, "shard-1")
    assert shard.loaded == [key_of(adapter)]


async def test_a_dead_shard_is_drained_and_stays_out_when_it_is_back(plane: Plane) -> None:
    (adapter,) = living_on("shard-1")
    await plane.ready(adapter)
    plane.control.lose("shard-1", KILLED)
    assert not (await drain(plane, "shard-1")).moved
    shard: Any = plane.shards["shard-1"]
    shard.loaded.clear()
    await plane.control.prepare(shard)
    await plane.control.admit("shard-1", no_slot)
    assert states(plane)["shard-1"] is ShardState.DRAINING
    await resume(plane, "shard-1")
    assert shard.loaded == [key_of(adapter)], "what it had when it died"


async def test_a_dead_shard_is_resumed_and_takes_requests_when_it_is_back(plane: Plane) -> None:
    (adapter,) = living_on("shard-1")
    await plane.ready(adapter)
    await drain(plane, "shard-1")
    plane.control.lose("shard-1", KILLED)
    shard: Any = plane.shards["shard-1"]
    shard.loaded.clear()
    await resume(plane, "shard-1")
    await plane.control.prepare(shard)
    assert shard.loaded == [key_of(adapter)]
    await plane.control.admit("shard-1", no_slot)
    assert states(plane)["shard-1"] is ShardState.UP


async def test_a_shard_that_dies_while_it_is_resumed_is_resumed(plane: Plane) -> None:
    (adapter,) = living_on("shard-1")
    await drain(plane, "shard-1")
    await plane.ready(adapter)
    shard: Any = plane.shards["shard-1"]
    shard.may_load.clear()
    shard.loading.clear()
    resuming = asyncio.create_task(resume(plane, "shard-1"))
    await shard.loading.wait()
    plane.control.lose("shard-1", KILLED)
    await resuming
    assert not plane.control.drained


async def test_a_core_that_does_not_answer_is_not_idle_and_one_that_is_dead_is(
    plane: Plane, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.drains.CORE_ANSWER_S", 0.01)
    core: Any = plane.shards["shard-1"]

    async def hangs() -> Load:
        await asyncio.Event().wait()
        raise AssertionError

    async def is_dead() -> Load:
        raise ShardUnavailable("shard-1")

    monkeypatch.setattr(core, "core_load", hangs)
    assert not await drains_of(plane).is_idle("shard-1")
    told = (await shards(plane))["shard-1"]
    assert not told.HasField("load") and told.places > 0
    monkeypatch.setattr(core, "core_load", is_dead)
    assert await drains_of(plane).is_idle("shard-1")


# --- beside other things -----------------------------------------------------


async def test_a_drain_waits_for_a_plan_so_that_copies_are_where_the_route_goes(
    plane: Plane,
) -> None:
    (adapter,) = living_on("shard-1")
    await plane.ready(adapter)
    second, third = order(adapter)[1:]
    plane.shards[second].may_load.clear()
    plane.shards[second].loading.clear()
    plane.control.hear(Used({AdapterKey(TENANT, adapter): 40_000}))  # hot enough for copies
    planning = plane.control._planning
    assert planning is not None
    renewing = asyncio.create_task(planning.renew())
    await plane.shards[second].loading.wait()
    draining = asyncio.create_task(drains_of(plane).drain(second))
    for _ in range(100):
        await asyncio.sleep(0)
    assert not plane.control.drained
    plane.shards[second].may_load.set()
    await renewing
    await draining
    assert plane.control.plan.replicas and plane.control.drained == {second}
    assert key_of(adapter) in plane.shards[third].loaded


async def test_the_gateway_and_an_operator_want_a_shard_drained_each_for_itself(
    plane: Plane,
) -> None:
    drains = drains_of(plane)
    await drains.drain("shard-1", wish=Wish.RENEWAL)
    told = await resume(plane, "shard-1")
    assert told.drain.by_renewal, "it is not the operator's"
    await drain(plane, "shard-1")
    await drains.resume("shard-1", wish=Wish.RENEWAL)
    assert plane.control.drained == {"shard-1"}
    await drains.resume("shard-1", wish=Wish.RENEWAL)
    assert plane.control.drained == {"shard-1"}
    await drains.drain("shard-1", wish=Wish.RENEWAL)
    await resume(plane, "shard-1")
    assert plane.control.drained == {"shard-1"}
    await drains.resume("shard-1", wish=Wish.RENEWAL)
    assert not plane.control.drained


async def test_unloading_and_deleting_reach_a_drained_shard(plane: Plane) -> None:
    (adapter,) = living_on("shard-1")
    await plane.ready(adapter)
    await drain(plane, "shard-1")
    await plane.stub.UnloadAdapterVersion(
        named(adapters_pb2.UnloadAdapterVersionRequest, adapter), timeout=TIMEOUT_S
    )
    assert not [name for name, shard in plane.shards.items() if shard.loaded]
