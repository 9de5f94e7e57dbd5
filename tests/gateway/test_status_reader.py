"""What the page shows is what is so: read from a real control plane over fake shards."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import pytest_asyncio

from engine.core import EngineOptions
from engine.generation import Load, VersionKey
from engine.ring import AdapterKey
from engine.screening import Screening
from gateway import shard_sight
from gateway.adapter_sight import ADAPTERS_SHOWN, OUTCOMES_READ, WINDOW_S
from gateway.keeper import ShardKeeper
from gateway.keeper_state import KeeperState
from gateway.messages import Ended, Used
from gateway.note import Note
from gateway.settings import Settings
from gateway.shard_sight import RESIDENTS_SHOWN, SHARDS_ASKED, ShardSight
from gateway.status import Phase, ShardStatus, encode
from gateway.status_reader import StatusReader
from gateway.supervisor import Supervisor
from gateway.worker_process import WorkerState
from gateway.workers import WorkerFleet
from lora_gateway.v1 import adapters_pb2 as pb
from tests.gateway.control_plane import TENANT, TIMEOUT_S, LoadableShard, Plane, control_plane
from tests.gateway.outcomes import failure, outcome

OPTIONS: Any = object.__new__(EngineOptions)


class FakeFleet:
    """Workers, as many as a test says."""

    def __init__(self) -> None:
        self.numbers = {WorkerState.SERVING: 1}
        self.draining = False
        self.notes: list[Note] = []


def keeper_of(shard: LoadableShard, state: KeeperState = KeeperState.UP) -> ShardKeeper:
    keeper = ShardKeeper(shard.name, OPTIONS, nullcontext, 1.0, Path(), Screening())
    keeper.state = state
    keeper.shard = cast(Any, shard if state is KeeperState.UP else None)
    return keeper


class Sight:
    """A reader over a control plane, and what a test changes under it."""

    def __init__(self, plane: Plane) -> None:
        self.plane = plane
        self.fleet = FakeFleet()
        self.keepers = [keeper_of(shard) for shard in plane.shards.values()]
        self.reader = StatusReader(Settings(model="/srv/models/llama", shards=len(self.keepers)))
        self.reader.fleet = cast(WorkerFleet, self.fleet)
        self.reader.supervisor = Supervisor(self.keepers, compiles=False)
        self.reader.control = plane.control

    async def split(self, *weights: int, guard: pb.TrafficGuard | None = None) -> None:
        splits = [
            pb.TrafficSplit(version=version, weight=weight)
            for version, weight in enumerate(weights, 1)
        ]
        request = pb.SetTrafficRequest(adapter="sql", splits=splits, guard=guard)
        await self.plane.stub.SetTraffic(request, timeout=TIMEOUT_S)

    async def shard(self) -> ShardStatus:
        return (await self.reader.read()).shards[0]


@pytest_asyncio.fixture(loop_scope="session")
async def sight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Sight]:
    async with control_plane(tmp_path, monkeypatch) as plane:
        yield Sight(plane)


async def test_a_gateway_that_starts_has_its_shards_to_come() -> None:
    reader = StatusReader(Settings(model="tiny"))
    status = await reader.read()
    assert (status.phase, status.model, status.workers_wanted) == (Phase.STARTING, "tiny", 1)
    (shard,) = status.shards
    assert (shard.name, shard.state, shard.answers) == ("shard-0", "starting", False)
    assert not status.adapters and not status.jobs and not status.events
    encode(status)


async def test_the_phase_is_told_from_what_runs(sight: Sight) -> None:
    phase, shards = sight.reader.phase, sight.plane.control.sights.shards
    assert phase() is Phase.SERVING
    assert shards is not None
    shards.pool.drain(["shard-0"])
    assert phase() is Phase.UNAVAILABLE, "it is up, and takes no requests"
    shards.pool.drain([])
    assert phase() is Phase.SERVING
    shards.lose("shard-0")
    assert phase() is Phase.UNAVAILABLE
    sight.fleet.numbers = {WorkerState.ATTACHING: 1}
    assert phase() is Phase.STARTING
    sight.fleet.draining = True
    assert phase() is Phase.DRAINING


async def test_of_files_their_names_alone_are_told(sight: Sight) -> None:
    status = await sight.reader.read()
    assert status.model == "llama"
    assert b"/srv" not in encode(status)


async def test_a_shard_is_told_with_its_load_and_what_it_holds(sight: Sight) -> None:
    await sight.plane.ready()
    key = VersionKey(TENANT, "sql", 1)
    sight.plane.shard.load_now = Load(5, 3, 2, 0.5)
    route = sight.plane.control.sights.shards
    assert route is not None
    async with route.pool.route_to(key).lease():
        shard = await sight.shard()
    assert (shard.state, shard.answers, shard.reason) == ("up", True, "")
    assert (shard.running, shard.waiting, shard.deferred) == (5, 3, 2)
    assert shard.kv_cache_usage == 0.5
    assert (shard.places, shard.resident_count) == (64, 1)
    (resident,) = shard.residents
    assert (resident.adapter, resident.version, resident.holds) == ("sql", 1, 1)
    assert resident.last_use_time_s is not None
    assert abs(time.time() - resident.last_use_time_s) < TIMEOUT_S
    (resident,) = (await sight.shard()).residents
    assert resident.holds == 0


async def test_many_residents_are_told_by_number(sight: Sight) -> None:
    for number in range(RESIDENTS_SHOWN + 2):
        await sight.plane.ready(f"a{number}")
    shard = await sight.shard()
    assert shard.resident_count == RESIDENTS_SHOWN + 2
    assert len(shard.residents) == RESIDENTS_SHOWN


async def test_a_core_that_does_not_answer_is_told_so_in_time(
    sight: Sight, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_sight, "LOAD_TIMEOUT_S", 0.01)

    async def hangs() -> Load:
        await asyncio.Event().wait()
        raise AssertionError

    monkeypatch.setattr(sight.plane.shard, "core_load", hangs)
    async with asyncio.timeout(TIMEOUT_S):
        shard = await sight.shard()
    assert (shard.state, shard.answers, shard.running) == ("up", False, 0)


async def test_a_dead_shard_is_told_with_its_reason_until_it_is_up(sight: Sight) -> None:
    (keeper,) = sight.keepers
    keeper.state, keeper.shard, keeper.restarts = KeeperState.REBUILDING, None, 1
    keeper.notes.append(Note(time.time(), "ended: killed by SIGKILL", is_trouble=True))
    status = await sight.reader.read()
    shard = status.shards[0]
    assert (shard.state, shard.reason) == ("rebuilding", "ended: killed by SIGKILL")
    assert (shard.answers, shard.restarts, shard.slots_left) == (False, 1, 0)
    event = status.events[0]
    assert (event.subject, event.text) == ("shard-0", "ended: killed by SIGKILL")
    assert event.is_trouble
    keeper.state = KeeperState.UP
    assert (await sight.shard()).reason == ""


async def test_a_shard_that_is_up_and_drained_is_told_so(sight: Sight) -> None:
    (keeper,) = sight.keepers
    assert sight.plane.control.sights.shards is not None
    sight.plane.control.sights.shards.pool.drain([keeper.name])
    assert (await sight.shard()).state == "drained"
    keeper.state, keeper.shard = KeeperState.REBUILDING, None
    assert (await sight.shard()).state == "rebuilding", "that says more"


async def test_turns_are_told_in_their_order(sight: Sight, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_sight, "TURNS_SHOWN", 2)
    shards = sight.plane.control.sights.shards
    assert shards is not None
    slots = shards.slots["shard-0"]
    names = [f"a{number}" for number in range(slots.capacity + 3)]
    for name in names:
        slots.note_waiting(VersionKey(TENANT, name, 1), 4711, True)
    shard = await sight.shard()
    assert (shard.batch_slots, shard.turns_held, shard.turns_waiting) == (8, 8, 3)
    told = [(turn.adapter, turn.version, turn.state) for turn in shard.turns]
    assert told == [
        *(("a0", 1, "held"), ("a1", 1, "held")),
        *(("a8", 1, "waiting"), ("a9", 1, "waiting")),
    ]
    for turn in shard.turns:
        assert abs(time.time() - turn.since_s) < TIMEOUT_S


async def test_deaths_of_workers_are_told_among_what_happened(sight: Sight) -> None:
    await sight.plane.ready()
    text = "worker 4711 died while serving (exit code -9)"
    sight.fleet.notes.append(Note(time.time() + 1, text, is_trouble=True))
    event = (await sight.reader.read()).events[0]
    assert (event.subject, event.text, event.is_trouble) == ("workers", text, True)


async def test_arms_are_told_with_how_they_did_in_the_last_minute(sight: Sight) -> None:
    for _ in range(2):
        await sight.plane.ready()
    guard = pb.TrafficGuard(version=2, max_error_ratio=0.2, max_ttft_p95_ms=500, min_requests=20)
    await sight.split(3, 1, guard=guard)
    now_s = time.time()
    good = [
        outcome(
            adapter="sql", request_id=f"r{n}", end_s=now_s - 10, ttft_s=n / 10, completion_tokens=6
        )
        for n in range(1, 10)
    ]
    bad = failure(adapter="sql", request_id="bad", end_s=now_s - 10)
    gave_up = failure(adapter="sql", request_id="gone", end_s=now_s - 10, code="CANCELLED")
    old = outcome(adapter="sql", request_id="old", end_s=now_s - WINDOW_S - 1)
    sight.plane.control.hear(Ended([old, *good, bad, gave_up]))
    sight.plane.control.hear(Used({AdapterKey(TENANT, "sql"): 120}))
    (adapter,) = (await sight.reader.read()).adapters
    assert (adapter.name, adapter.ready, adapter.shards) == ("sql", 2, ("shard-0",))
    assert adapter.tokens_per_s == 2.0
    first, second = adapter.arms
    assert (first.version, first.share, first.guard) == (1, 0.75, "")
    assert first.requests == 11
    assert first.requests_per_s == pytest.approx(11 / WINDOW_S, abs=0.001)
    assert first.tokens_per_s == pytest.approx(54 / WINDOW_S, abs=0.01)
    assert first.error_ratio == pytest.approx(1 / 11)
    assert (first.ttft_p50_ms, first.ttft_p95_ms) == pytest.approx((500.0, 900.0))
    assert (second.version, second.share, second.requests) == (2, 0.25, 0)
    assert second.guard == "errors above 0.2 or ttft p95 above 500 ms, from 20 requests on"
    assert (second.error_ratio, second.ttft_p50_ms, second.ttft_p95_ms) == (None, None, None)


async def test_rates_of_a_busy_arm_are_of_the_time_that_its_requests_took(sight: Sight) -> None:
    await sight.plane.ready()
    now_s = time.time()
    sight.plane.control.hear(
        Ended(
            [
                outcome(adapter="sql", request_id=f"r{n}", end_s=now_s - 20 + n / 25)
                for n in range(2 * OUTCOMES_READ)
            ]
        )
    )
    ((arm,),) = (adapter.arms for adapter in (await sight.reader.read()).adapters)
    assert arm.requests == OUTCOMES_READ
    assert arm.requests_per_s == pytest.approx(25, rel=0.2)


async def test_the_busiest_adapters_are_shown_and_the_rest_counted(sight: Sight) -> None:
    for number in range(ADAPTERS_SHOWN + 2):
        await sight.plane.ready(f"a{number:02}")
    sight.plane.control.hear(
        Used({AdapterKey(TENANT, "a21"): 100, AdapterKey(TENANT, "a20"): 200, None: 1000})
    )
    status = await sight.reader.read()
    names = [adapter.name for adapter in status.adapters]
    assert names == ["a20", "a21", *(f"a{number:02}" for number in range(ADAPTERS_SHOWN - 2))]
    assert status.adapter_count == ADAPTERS_SHOWN + 2


async def test_an_adapter_without_traffic_has_no_arms(sight: Sight) -> None:
    await sight.plane.ready()
    await sight.split()
    (adapter,) = (await sight.reader.read()).adapters
    assert (adapter.ready, list(adapter.arms)) == (1, [])


async def test_what_happened_is_told_newest_first_and_grows(sight: Sight) -> None:
    await sight.plane.ready()
    told = [(event.subject, event.text) for event in (await sight.reader.read()).events]
    assert told == [
        ("sql", "traffic set to 1 = 100 %: first READY version"),
        ("sql@1", "is ready"),
        ("sql@1", "created"),
    ]
    await sight.split(1)
    status = await sight.reader.read()
    assert (status.events[0].subject, status.events[0].text) == ("sql", "traffic set to 1 = 100 %")
    assert [(event.subject, event.text) for event in status.events[1:]] == told
    uri = sight.plane.write_source("bad", findings=["/srv/private/x.json is wrong"])
    request = pb.CreateAdapterVersionRequest(adapter="sql", source_uri=uri)
    await sight.plane.stub.CreateAdapterVersion(request, timeout=TIMEOUT_S)
    await sight.plane.until("sql", 2, pb.VERSION_STATE_FAILED)
    status = await sight.reader.read()
    assert status.events[0].subject == "sql@2" and status.events[0].is_trouble
    assert b"/srv" not in encode(status)


async def test_tokens_a_second_are_told_for_two_minutes(sight: Sight) -> None:
    status = await sight.reader.read()
    assert len(status.tokens_per_s) * status.interval_s == pytest.approx(120, abs=2)


class Counts:
    """Stands for the workers: counts who is asked about."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    async def uses(self, shard: str) -> dict[VersionKey, Any]:
        self.asked.append(shard)
        return {}


async def test_workers_are_asked_about_a_few_shards_at_once_and_about_all_in_turn() -> None:
    shards = [LoadableShard(f"shard-{number}") for number in range(2 * SHARDS_ASKED + 1)]
    names = [shard.name for shard in shards]
    counts = Counts()

    sights = SimpleNamespace(
        processes=counts,
        shards=SimpleNamespace(
            residencies=dict.fromkeys(names, EMPTY),
            pool=SimpleNamespace(drained=frozenset()),
            slots={},
        ),
    )
    sight = ShardSight()
    keepers = [keeper_of(shard) for shard in shards]
    for turn in range(1, 4):
        statuses = await sight.read(keepers, cast(Any, sights))
        assert [status.name for status in statuses] == names
        assert len(counts.asked) == turn * SHARDS_ASKED
    assert set(counts.asked) == set(names)


EMPTY = SimpleNamespace(capacity=64, places=list)
"""Of a shard that has nothing loaded."""
