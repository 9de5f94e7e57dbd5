"""Admin tells how shards are and why a request goes where it goes, over scripted workers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio

from engine.fake import FakeShard
from engine.generation import Load, VersionKey
from engine.pool import ShardPool
from engine.residents import Residents, Use
from gateway.explanation import explain
from gateway.keeper import Death
from gateway.keeper_state import KeeperState
from gateway.messages import (
    Explain,
    FollowDrains,
    FollowPlan,
    Placed,
    Question,
    TellPlaced,
    TellUses,
)
from lora_gateway.v1 import adapters_pb2
from lora_gateway.v1 import admin_pb2 as pb
from tests.engine.open_slots import open_slots
from tests.gateway.control_plane import KILLED, TIMEOUT_S, Plane, control_plane
from tests.gateway.promises import refused
from tests.gateway.scripted_worker import SILENT, ScriptedWorker, serving_fleet
from tests.gateway.three_shards import (
    NAMES,
    drain,
    key_of,
    living_on,
    order,
    resume,
    shards,
    stub_of,
)

MAX_LORAS = 2


async def _nothing_in_core(lora_int_id: int) -> int:
    return 0


@dataclass
class Workers:
    """Two workers with pools of their own, over the view of the control plane."""

    pools: dict[int, ShardPool] = field(default_factory=dict)
    uses: dict[str, dict[VersionKey, Use]] = field(default_factory=dict)
    """What each of them tells, by shard."""
    silent: set[int] = field(default_factory=set)
    """Numbers of those that do not answer."""
    plane: Plane | None = None

    def pool(self, number: int) -> ShardPool:
        assert self.plane is not None
        if number not in self.pools:
            fakes = [FakeShard(name) for name in NAMES]
            residents = {
                name: Residents(lambda key: None, _nothing_in_core, open_slots()) for name in NAMES
            }
            self.pools[number] = ShardPool(fakes, residents, self.plane.control.view)
        return self.pools[number]

    def answer(self, worker: ScriptedWorker, question: Question) -> Any:
        number = list(type(worker).born).index(worker)
        if number in self.silent and not isinstance(question, FollowDrains):
            return SILENT
        match question:
            case FollowDrains(names):
                self.pool(number).drain(names)
            case FollowPlan(plan):
                self.pool(number).follow(plan)
            case TellPlaced():
                return Placed(self.pool(number).in_flight, self.pool(number).placed)
            case TellUses(shard):
                return self.uses.get(shard, {})
            case Explain():
                told = explain(self.pool(number), question)
                return None if told is None else replace(told, process_id=100 + number)
        return None


@pytest_asyncio.fixture
async def workers() -> Workers:
    return Workers()


@pytest_asyncio.fixture
async def plane(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: Workers
) -> AsyncIterator[Plane]:
    monkeypatch.setattr("gateway.processes.ANSWER_TIMEOUT_S", 0.5)
    async with (
        serving_fleet(monkeypatch, 2, workers.answer) as (fleet, _),
        control_plane(
            tmp_path, monkeypatch, shards=3, fleet=fleet, max_loras=MAX_LORAS, max_cpu_loras=4
        ) as plane,
    ):
        workers.plane = plane
        yield plane


async def explained(plane: Plane, **fields: Any) -> pb.ExplainRouteResponse:
    request = pb.ExplainRouteRequest(**fields)
    answer: pb.ExplainRouteResponse
    answer = await stub_of(plane).ExplainRoute(request, timeout=TIMEOUT_S)
    return answer


def forget_use(plane: Plane, shard: str, key: VersionKey) -> None:
    """As if the host had not tried the version there."""
    assert plane.control._shards is not None
    plane.control._shards._residents[shard]._residents[key].last_use_s = 0.0


# --- ListShards ---------------------------------------------------------------


async def test_a_shard_tells_all_that_is_known_of_it(plane: Plane, workers: Workers) -> None:
    (adapter,) = living_on("shard-1")
    await plane.ready(adapter)
    forget_use(plane, "shard-1", key_of(adapter))
    workers.uses["shard-1"] = {key_of(adapter): Use(2, time.monotonic() - 100.0)}
    for number in (0, 1):
        lease = workers.pool(number).route_to(key_of(adapter)).lease()
        lease._route.in_flight["shard-1"] += 1 + number
    plane.shards["shard-1"].load_now = Load(3, 2, 1, 0.25)
    keeper = plane.keepers["shard-1"]
    keeper.last_death = Death("killed by SIGKILL", 1_700_000_000.5)
    keeper.restarts, keeper.slots_left = 2, 17
    told = await shards(plane)
    assert list(told) == list(NAMES)
    shard = told["shard-1"]
    assert (shard.state, shard.restarts, shard.client_slots_left) == (pb.SHARD_STATE_UP, 2, 17)
    assert shard.state_time.ToMilliseconds() == 1500
    assert shard.last_death.reason == "killed by SIGKILL"
    assert shard.last_death.time.ToMilliseconds() == 1_700_000_000_500
    assert (shard.in_flight, shard.places) == (3, 4)
    assert shard.load == pb.ShardLoad(running=3, waiting=2, deferred=1, kv_cache_usage=0.25)
    (resident,) = shard.residents
    assert (resident.tenant, resident.adapter, resident.version) == ("default", adapter, 1)
    assert resident.requests == 4, "of both"
    assert abs(resident.last_use_time.seconds - (time.time() - 100)) < 50
    assert not shard.HasField("drain") and not shard.HasField("next_start_time")
    assert not told["shard-0"].residents and not told["shard-0"].HasField("last_death")


async def test_a_version_that_nobody_used_has_no_time_of_use(plane: Plane) -> None:
    (adapter,) = living_on("shard-1")
    await plane.ready(adapter)
    forget_use(plane, "shard-1", key_of(adapter))
    (told,) = (await shards(plane))["shard-1"].residents
    assert not told.HasField("last_use_time") and told.load_time.seconds > 1_000_000


async def test_a_dead_shard_tells_when_it_is_tried_again(plane: Plane) -> None:
    keeper = plane.keepers["shard-2"]
    keeper.state, keeper.next_start_s = KeeperState.DEAD, 1_700_000_060.0
    plane.control.lose("shard-2", KILLED)
    shard = (await shards(plane))["shard-2"]
    assert shard.state == pb.SHARD_STATE_DEAD
    assert shard.next_start_time.seconds == 1_700_000_060
    assert not shard.HasField("load") and not shard.residents


@pytest.mark.parametrize("state", KeeperState, ids=lambda state: state.value)
async def test_each_state_of_a_keeper_has_a_name(plane: Plane, state: KeeperState) -> None:
    plane.keepers["shard-0"].state = state
    told = (await shards(plane))["shard-0"].state
    assert pb.ShardState.Name(told) == f"SHARD_STATE_{state.name}"


# --- drains reach the workers ---------------------------------------------------


async def test_a_drain_is_followed_by_all_workers_when_it_is_answered(
    plane: Plane, workers: Workers
) -> None:
    await drain(plane, "shard-1")
    assert [pool.drained for pool in workers.pools.values()] == [{"shard-1"}] * 2
    await drain(plane, "shard-0")
    assert [pool.drained for pool in workers.pools.values()] == [{"shard-0", "shard-1"}] * 2
    await resume(plane, "shard-1")
    assert [pool.drained for pool in workers.pools.values()] == [{"shard-0"}] * 2


async def test_a_drain_waits_for_what_workers_have_in_flight(
    plane: Plane, workers: Workers
) -> None:
    in_flight = workers.pool(1)._in_flight
    in_flight["shard-1"] = 1
    draining = asyncio.create_task(drain(plane, "shard-1", wait=True))
    async with asyncio.timeout(TIMEOUT_S):
        while plane.control.drained != {"shard-1"}:
            await asyncio.sleep(0.01)
    assert not (await asyncio.wait([draining], timeout=0.5))[0]
    in_flight["shard-1"] = 0
    assert (await draining).shard.in_flight == 0


# --- ExplainRoute ---------------------------------------------------------------


async def test_a_route_is_told_with_all_that_decides_it(plane: Plane, workers: Workers) -> None:
    (adapter,) = living_on("shard-1")
    await plane.ready(adapter)
    workers.pool(1)._in_flight["shard-2"] = 5
    answer = await explained(plane, adapter=adapter)
    assert (answer.version, answer.version_reason) == (1, pb.VERSION_REASON_ONLY_ONE)
    assert [(split.version, split.weight) for split in answer.splits] == [(1, 100)]
    assert answer.shard == "shard-1"
    assert tuple(shard.shard for shard in answer.shards) == order(adapter)
    assert [shard.resident for shard in answer.shards] == [True, False, False]
    assert all(shard.state == pb.SHARD_STATE_UP for shard in answer.shards)
    assert [shard.places_left for shard in answer.shards] == [3, 4, 4]
    assert [worker.worker for worker in answer.workers] == [100, 101]
    for worker, loads in zip(answer.workers, ({}, {"shard-2": 5}), strict=True):
        assert (worker.version, worker.shard) == (1, "shard-1")
        assert worker.reason == pb.ROUTE_REASON_PLANNED
        assert (worker.replicas, worker.cap, worker.plan_revision) == (1, 4, 0)
        assert [(c.shard, c.in_flight) for c in worker.candidates] == [
            (name, loads.get(name, 0)) for name in order(adapter)
        ]


async def test_workers_decide_by_their_own_counts(plane: Plane, workers: Workers) -> None:
    (adapter,) = living_on("shard-1")
    await plane.ready(adapter)
    workers.pool(0)._in_flight["shard-1"] = 4
    answer = await explained(plane, adapter=adapter)
    assert [worker.reason for worker in answer.workers] == [
        pb.ROUTE_REASON_OVERFLOW,
        pb.ROUTE_REASON_PLANNED,
    ]
    assert [worker.shard for worker in answer.workers] == [order(adapter)[1], "shard-1"]
    assert answer.shard == "", "they differ"


async def test_the_arm_of_a_split_is_told_by_session(plane: Plane) -> None:
    (adapter,) = living_on("shard-1")
    for _ in range(2):
        await plane.ready(adapter)
    splits = [adapters_pb2.TrafficSplit(version=n, weight=50) for n in (1, 2)]
    await plane.stub.SetTraffic(adapters_pb2.SetTrafficRequest(adapter=adapter, splits=splits))
    for session in ("a", "b", "c", "d"):
        answer = await explained(plane, adapter=adapter, session_id=session)
        key = plane.control.view.resolve("default", adapter, None, session)
        assert key is not None and answer.version == key.version
        assert answer.version_reason == pb.VERSION_REASON_SPLIT
        assert {worker.version for worker in answer.workers} == {key.version}
    answer = await explained(plane, adapter=adapter, version=2)
    assert (answer.version, answer.version_reason) == (2, pb.VERSION_REASON_ASKED_FOR)


async def test_the_base_model_goes_to_the_least_loaded(plane: Plane, workers: Workers) -> None:
    workers.pool(0)._in_flight.update({"shard-0": 2, "shard-1": 1})
    answer = await explained(plane)
    assert (answer.version, answer.version_reason) == (0, pb.VERSION_REASON_BASE_MODEL)
    assert [shard.shard for shard in answer.shards] == list(NAMES)
    assert all(shard.resident and shard.slot_free for shard in answer.shards)
    assert [worker.shard for worker in answer.workers] == ["shard-2", "shard-0"]
    assert {worker.reason for worker in answer.workers} == {pb.ROUTE_REASON_LEAST_LOADED}
    assert not answer.splits


async def test_a_shard_that_is_drained_or_dead_is_told_and_stood_in_for(plane: Plane) -> None:
    (adapter,) = living_on("shard-1")
    await plane.ready(adapter)
    await drain(plane, "shard-1")
    answer = await explained(plane, adapter=adapter)
    assert answer.shard == order(adapter)[1]
    assert {worker.reason for worker in answer.workers} == {pb.ROUTE_REASON_FAILOVER}
    assert [shard.drained for shard in answer.shards] == [True, False, False]
    assert answer.shards[0].resident and answer.shards[1].resident
    plane.keepers["shard-1"].state = KeeperState.DEAD
    answer = await explained(plane)
    assert [(s.drained, s.resident) for s in answer.shards if s.shard == "shard-1"] == [
        (True, False)
    ]


async def test_slots_are_told_by_who_has_them_and_what_runs(plane: Plane, workers: Workers) -> None:
    adapters = living_on("shard-1", 3)
    for adapter in adapters:
        await plane.ready(adapter)
    # The probes were the first to have slots, and keep them until somebody waits.
    first, second = [key.adapter for key in plane.control.granted["shard-1"]]
    (third,) = {*adapters} - {first, second}
    assert (await explained(plane, adapter=third)).shards[0].slot_free, "the others are idle"
    workers.uses["shard-1"] = {key_of(first): Use(1, 1.0), key_of(second): Use(2, 1.0)}
    told = (await explained(plane, adapter=third)).shards[0]
    assert (told.adapters_in_use, told.slot_free, told.places_left) == (MAX_LORAS, False, 1)
    assert (await explained(plane, adapter=first)).shards[0].slot_free, "it is one of them"
    workers.uses["shard-1"] = {key_of(first): Use(1, 1.0), key_of(second): Use(0, 1.0)}
    assert (await explained(plane, adapter=third)).shards[0].slot_free


async def test_without_an_open_shard_that_is_told(plane: Plane, workers: Workers) -> None:
    for number in (0, 1):
        for name in NAMES:
            workers.pool(number).leave(name)
    answer = await explained(plane)
    assert {worker.reason for worker in answer.workers} == {pb.ROUTE_REASON_NO_SHARD_OPEN}
    assert answer.shard == "" and {worker.shard for worker in answer.workers} == {""}


async def test_a_worker_that_is_silent_or_does_not_know_it_is_left_out(
    plane: Plane, workers: Workers
) -> None:
    (adapter,) = living_on("shard-1")
    await plane.ready(adapter)
    workers.silent.add(0)
    answer = await explained(plane, adapter=adapter)
    assert [worker.shard for worker in answer.workers] == ["shard-1"] and answer.shard == "shard-1"


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"adapter": "No Name"}, ["adapter"]),
        ({"version": 1}, ["version"]),
        ({"adapter": "sql", "version": 0}, ["version"]),
    ],
    ids=["bad name", "version of the base model", "version 0"],
)
async def test_what_is_no_request_is_refused(
    plane: Plane, fields: dict[str, Any], names: list[str]
) -> None:
    assert (await refused(explained(plane, **fields))).fields == names


async def test_what_inference_would_refuse_is_refused_alike(plane: Plane) -> None:
    assert (await refused(explained(plane, adapter="nobody"))).reason == "ADAPTER_NOT_FOUND"
    (adapter,) = living_on("shard-1")
    await plane.ready(adapter, no_traffic=True)
    refusal = await refused(explained(plane, adapter=adapter, version=9))
    assert refusal.reason == "VERSION_NOT_FOUND"
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await explained(plane, adapter=adapter)
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
