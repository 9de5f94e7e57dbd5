"""The control plane over two shards: what is loaded where, tried where, and copied when."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio

from engine.generation import Load, VersionKey
from engine.ring import AdapterKey, Ring, ShardState
from gateway.messages import Used, Want
from lora_gateway.v1 import adapters_pb2 as pb
from tests.details import error_info
from tests.gateway.control_plane import KILLED, TENANT, TIMEOUT_S, Plane, control_plane, named

NAMES = ("shard-0", "shard-1")
RING = Ring(dict.fromkeys(NAMES, ShardState.UP))


@pytest_asyncio.fixture
async def plane(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Plane]:
    async with control_plane(tmp_path, monkeypatch, shards=2) as plane:
        yield plane


def order(adapter: str) -> tuple[str, ...]:
    return RING.ranked(AdapterKey(TENANT, adapter))


def living_on(shard: str) -> str:
    """An adapter whose home is this shard."""
    names = (f"a{number}" for number in range(100))
    return next(name for name in names if order(name)[0] == shard)


def loaded(plane: Plane) -> dict[str, list[VersionKey]]:
    return {name: list(shard.loaded) for name, shard in plane.shards.items()}


async def until_loaded(plane: Plane, shard: str, key: VersionKey) -> None:
    async with asyncio.timeout(TIMEOUT_S):
        while key not in plane.shards[shard].loaded:
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("home", NAMES)
async def test_a_version_is_tried_and_loaded_on_its_home_alone(plane: Plane, home: str) -> None:
    adapter = living_on(home)
    version = await plane.ready(adapter)
    key = VersionKey(TENANT, adapter, version.version)
    assert loaded(plane) == {name: [key] * (name == home) for name in NAMES}
    told = await plane.stub.GetAdapterVersion(named(pb.GetAdapterVersionRequest, adapter))
    assert [residency.shard for residency in told.adapter_version.residency] == [home]


async def test_traffic_and_loads_go_to_the_home_and_an_unload_takes_all_out(plane: Plane) -> None:
    adapter = living_on("shard-1")
    await plane.ready(adapter)
    key = VersionKey(TENANT, adapter, 1)
    await plane.stub.UnloadAdapterVersion(named(pb.UnloadAdapterVersionRequest, adapter))
    assert loaded(plane) == {name: [] for name in NAMES}
    await plane.stub.PromoteVersion(pb.PromoteVersionRequest(adapter=adapter, version=1))
    assert loaded(plane) == {"shard-0": [], "shard-1": [key]}
    plane.control.hear(Want("shard-0", key))  # a request that the cap sent there
    await until_loaded(plane, "shard-0", key)
    await plane.stub.UnloadAdapterVersion(named(pb.UnloadAdapterVersionRequest, adapter))
    assert loaded(plane) == {name: [] for name in NAMES}
    await plane.stub.LoadAdapterVersion(named(pb.LoadAdapterVersionRequest, adapter))
    assert loaded(plane) == {"shard-0": [], "shard-1": [key]}


async def test_an_evaluation_asks_its_own_shard_for_capacity(plane: Plane) -> None:
    adapter = living_on("shard-1")
    await plane.ready(adapter)
    plane.shards["shard-0"].load_now = Load(0, 99, 0, 1.0)
    request = pb.EvaluateVersionRequest(
        adapter=adapter,
        versions=[0, 1],
        examples=[pb.EvaluationExample(text="one two", expected="0")],
        max_tokens=1,
    )
    events = [event async for event in plane.stub.EvaluateVersion(request, timeout=TIMEOUT_S)]
    assert events[-1].WhichOneof("event") == "summary"
    plane.shards["shard-1"].load_now = Load(0, 1, 0, 1.0)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        [event async for event in plane.stub.EvaluateVersion(request, timeout=0.3)]
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED


async def test_a_hot_adapter_is_copied_before_anybody_is_told(plane: Plane) -> None:
    adapter = living_on("shard-1")
    await plane.ready(adapter)
    await plane.ready(adapter, no_traffic=True)
    await plane.ready("cold")
    key = AdapterKey(TENANT, adapter)
    planning = plane.control._planning
    assert planning is not None
    await planning.renew()
    assert plane.control.plan.revision == 0
    copy = plane.shards["shard-0"]
    copy.loading.clear()
    copy.may_load.clear()
    plane.control.hear(Used({key: 90_000, AdapterKey(TENANT, "cold"): 100, None: 10_000}))
    renewing = asyncio.create_task(planning.renew())
    async with asyncio.timeout(TIMEOUT_S):
        await copy.loading.wait()
    assert plane.control.plan.revision == 0, "nobody chooses a copy that is not there"
    copy.may_load.set()
    await renewing
    assert plane.control.plan.replicas == ((key, 2),)
    assert VersionKey(TENANT, adapter, 1) in copy.loaded
    assert VersionKey(TENANT, adapter, 2) not in copy.loaded, "it has no traffic"


async def test_a_copy_that_cannot_be_loaded_does_not_hold_up_the_plan(plane: Plane) -> None:
    adapter = living_on("shard-1")
    await plane.ready(adapter)
    plane.shards["shard-0"].refuses[VersionKey(TENANT, adapter, 1)] = RuntimeError("no")
    plane.control.hear(Used({AdapterKey(TENANT, adapter): 90_000}))
    assert plane.control._planning is not None
    await plane.control._planning.renew()
    assert plane.control.plan.replicas == ((AdapterKey(TENANT, adapter), 2),)


# --- a shard that dies -------------------------------------------------------


async def test_a_lost_shard_gets_what_it_had_and_what_others_stood_in_for(plane: Plane) -> None:
    mine = living_on("shard-1")
    idle = next(name for name in ("b", "c", "d", "e", "f") if order(name)[0] == "shard-1")
    other = living_on("shard-0")
    await plane.ready(mine)
    await plane.ready(idle, no_traffic=True)
    await plane.ready(other)
    lost = plane.shards["shard-1"]
    plane.control.lose("shard-1", KILLED)
    plane.control.lose("shard-1", KILLED)
    lost.loaded.clear()
    for adapter in (mine, "late"):  # traffic goes on where the shard is up
        await plane.ready(adapter)
        assert VersionKey(TENANT, adapter, 1) in plane.shards["shard-0"].loaded or adapter == mine
    engine_side: Any = lost
    await plane.control.prepare(engine_side)
    expected = [VersionKey(TENANT, mine, 1)]
    if order("late")[0] == "shard-1":
        expected.append(VersionKey(TENANT, "late", 1))
    assert lost.loaded == expected, "what has traffic and lives here"
    assert plane.control.plan.revision == 0
    assert set(plane.control.resident) == set(NAMES)
    await plane.control.admit("shard-1", no_slot)
    await plane.stub.PromoteVersion(pb.PromoteVersionRequest(adapter=mine, version=2))
    assert VersionKey(TENANT, mine, 2) in lost.loaded


async def test_a_deletion_does_not_wait_for_a_shard_that_is_gone(plane: Plane) -> None:
    adapter = living_on("shard-1")
    await plane.ready(adapter, no_traffic=True)
    plane.control.lose("shard-1", KILLED)
    request = named(pb.DeleteAdapterVersionRequest, adapter)
    answer = await plane.stub.DeleteAdapterVersion(request, timeout=TIMEOUT_S)
    assert answer.adapter_version.state == pb.VERSION_STATE_DELETED


async def test_a_load_that_waits_when_its_shard_dies_is_told(plane: Plane) -> None:
    adapter = living_on("shard-1")
    await plane.ready(adapter)
    await plane.stub.UnloadAdapterVersion(named(pb.UnloadAdapterVersionRequest, adapter))
    shard = plane.shards["shard-1"]
    shard.may_load.clear()
    shard.loading.clear()
    request = named(pb.LoadAdapterVersionRequest, adapter)
    loading = asyncio.ensure_future(plane.stub.LoadAdapterVersion(request, timeout=TIMEOUT_S))
    await shard.loading.wait()
    plane.control.lose("shard-1", KILLED)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await loading
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    await plane.stub.LoadAdapterVersion(request, timeout=TIMEOUT_S)
    assert loaded(plane)["shard-0"] == [VersionKey(TENANT, adapter, 1)], "the next of its order"


async def test_a_validation_that_a_dead_shard_broke_off_goes_on_when_it_is_back(
    plane: Plane,
) -> None:
    adapter = living_on("shard-1")
    shard = plane.shards["shard-1"]
    shard.may_load.clear()
    uri = plane.write_source("new")
    request = pb.CreateAdapterVersionRequest(adapter=adapter, source_uri=uri)
    await plane.stub.CreateAdapterVersion(request)
    async with asyncio.timeout(TIMEOUT_S):
        await shard.loading.wait()
    plane.control.lose("shard-1", KILLED)
    shard.may_load.set()
    catalog = plane.control._adapters.catalog
    assert catalog is not None
    async with asyncio.timeout(TIMEOUT_S):
        while catalog.running:
            await asyncio.sleep(0.01)
    engine_side: Any = shard
    await plane.control.prepare(engine_side)
    await plane.control.admit("shard-1", no_slot)
    told = await plane.until(adapter, 1, pb.VERSION_STATE_READY)
    assert [residency.shard for residency in told.residency] == ["shard-1"]


async def test_without_any_shard_callers_are_told_to_come_back(plane: Plane) -> None:
    await plane.ready("sql")
    for name in NAMES:
        plane.control.lose(name, KILLED)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await plane.stub.LoadAdapterVersion(named(pb.LoadAdapterVersionRequest))
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert error_info(caught.value).reason == "SHARD_UNAVAILABLE"
    told = await plane.stub.GetAdapterVersion(named(pb.GetAdapterVersionRequest))
    assert told.adapter_version.state == pb.VERSION_STATE_READY
    assert not told.adapter_version.residency


def no_slot() -> Any:
    raise AssertionError("there is no worker")
