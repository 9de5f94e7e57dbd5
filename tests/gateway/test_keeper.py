"""A shard through its states: cores that start, die, hang and do not start, over fake ones."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from engine.core import EngineOptions
from engine.core_death import CoreDeath
from engine.errors import CoreFailed, ShardUnavailable
from engine.fingerprint import tag
from engine.screening import Screening
from engine.step_record import StepRecord
from gateway import keeper as module
from gateway import metrics
from gateway.keeper import ShardKeeper
from gateway.keeper_state import KeeperState
from gateway.restarts import Restarts

UP, DEAD = KeeperState.UP, KeeperState.DEAD
REBUILDING, WARMING, STOPPED = KeeperState.REBUILDING, KeeperState.WARMING, KeeperState.STOPPED
TIMEOUT_S = 5.0
STALL_S = 0.05


class FakeShard:
    """The host's client of a fake core."""

    def __init__(self, core: FakeCore) -> None:
        self.name = "shard-1"
        self.core = core
        self.broken = False
        self.closed = False
        self.said_dead = False
        self.verdict: bool | None = None
        self.called: list[str] = []
        self.dead = asyncio.Event()

    async def call_core(self, utility: str, *arguments: int | str) -> Any:
        self.called.append(utility)
        if utility == "gateway_record":
            self.core.record = StepRecord(Path(str(arguments[0])), 2, 8, 2)
        return [4711] if utility == "gateway_adopt" else 3

    async def warm_up(self) -> None:
        if self.core.hangs_at_first:
            await self.dead.wait()
            raise ShardUnavailable(self.name)

    async def answers(self, timeout_s: float) -> bool:
        if self.core.stopped:
            await asyncio.sleep(timeout_s)
        return not self.core.stopped

    def declare_dead(self, crashed: bool) -> None:
        self.verdict = crashed
        self.broken = True
        self.dead.set()

    def close(self) -> None:
        self.closed = True


class FakeCore:
    """A core that lives until a test ends it."""

    def __init__(self) -> None:
        self.died = asyncio.Event()
        self.stopped = False
        self.hangs_at_first = False
        self.greets = True
        self.ends: list[str] = []
        self.slots_left = 63
        self.code, self.is_stopped = -9, False
        self.record_path = Path()
        self.record: Any = None
        self.index = 1
        self.shard = FakeShard(self)

    def take_slot(self) -> Any:
        return self

    def issued(self, slot: object) -> bool:
        return slot is self

    def adopt(self, pids: list[int]) -> None:
        assert pids == [4711]

    async def ended(self) -> None:
        await self.died.wait()

    async def exit_code(self) -> int:
        return self.code

    async def stop(self, ask: Callable[[], Any] | None = None) -> None:
        if ask is not None:
            await ask()
        self.ends.append("killed" if ask is None else "in order")


class Stage:
    """A keeper, the cores that it starts, and all who follow it."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.started: list[tuple[int, str]] = []
        self.keeper = self.keeper_with(Restarts(lambda: 0.0))
        self.planned: list[FakeCore | Exception] = []
        """What the next starts come to; a core that lives if nothing is said."""
        self.cores: list[FakeCore] = []
        self.told: list[str] = []
        self.deaths: list[CoreDeath] = []
        self.may_prepare = asyncio.Event()
        self.may_prepare.set()

    def keeper_with(self, restarts: Restarts | None = None) -> ShardKeeper:
        rest = STALL_S, self.run_dir, Screening(), restarts
        tell = lambda *process: self.started.append(process)  # noqa: E731
        return ShardKeeper("shard-1", OPTIONS, nullcontext, *rest, started=tell)

    async def start_core(self, record_path: Path) -> FakeCore:
        planned = self.planned.pop(0) if self.planned else FakeCore()
        if isinstance(planned, Exception):
            raise planned
        planned.record_path = record_path
        self.cores.append(planned)
        return planned

    def lose(self, shard: str, death: CoreDeath) -> None:
        self.deaths.append(death)
        self.told.append(f"lost {self.keeper.state.value}")

    async def prepare(self, shard: Any) -> None:
        self.told.append(f"prepares {self.keeper.state.value}")
        await self.may_prepare.wait()

    async def admit(self, shard: str, take_slot: Callable[[], Any]) -> None:
        assert take_slot() is self.cores[-1]
        self.told.append(f"admitted {self.keeper.state.value}")

    async def until(self, state: KeeperState, cores: int) -> None:
        async with asyncio.timeout(TIMEOUT_S):
            while (self.keeper.state, len(self.cores)) != (state, cores):
                await asyncio.sleep(0)


OPTIONS: Any = object.__new__(EngineOptions)


@pytest_asyncio.fixture
async def stage(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> AsyncIterator[Stage]:
    """A keeper whose first core is up, and which keeps."""
    at = Stage(tmp_path)

    class Cores:
        @staticmethod
        async def start(
            name: str, config: Any, record_path: Path, environment: Any, started: Any
        ) -> Any:
            core = await at.start_core(record_path)
            started(42, f"core of {name}")
            return core

    class Shards:
        @staticmethod
        def attach(core: FakeCore, screening: Screening) -> FakeShard:
            if not core.greets:
                raise TimeoutError
            return core.shard

    monkeypatch.setattr(module, "EngineCore", Cores)
    monkeypatch.setattr(module, "VllmShard", Shards)
    monkeypatch.setattr(module, "ASK_INTERVAL_S", 0.01)
    monkeypatch.setattr(EngineOptions, "build_config", lambda options: object())
    await at.keeper.start()
    at.keeper.settled = True
    keeping = asyncio.create_task(at.keeper.keep(at))
    yield at
    keeping.cancel()
    await asyncio.gather(keeping, return_exceptions=True)
    await at.keeper.stop()


def value(metric: Any, *labels: str) -> float:
    return float(metric.labels("shard-1", *labels)._value.get())


async def test_a_core_that_dies_is_replaced_and_warm_before_anybody_uses_it(stage: Stage) -> None:
    before = value(metrics.shard_restarts, "died")
    (core,) = stage.cores
    stage.may_prepare.clear()
    core.died.set()
    await stage.until(WARMING, 2)
    assert core.ends == ["killed"] and core.shard.closed and core.shard.dead.is_set()
    assert stage.started == [(42, "core of shard-1"), (4711, "core of shard-1")] * 2
    await asyncio.sleep(0)
    assert stage.told == ["lost dead", "prepares warming"]
    stage.may_prepare.set()
    await stage.until(UP, 2)
    assert stage.told[2:] == ["admitted up"]
    assert value(metrics.shard_restarts, "died") == before + 1
    assert stage.keeper.shard is stage.cores[1].shard  # type: ignore[comparison-overlap]


async def test_what_happened_to_a_shard_is_noted_for_people(stage: Stage) -> None:
    begin_s = stage.keeper.since_s
    stage.planned = [CoreFailed("no memory")]
    stage.cores[0].died.set()
    await stage.until(UP, 2)
    async with asyncio.timeout(TIMEOUT_S):
        while len(stage.keeper.notes) < 3:
            await asyncio.sleep(0)
    texts = [(note.text.partition(" after ")[0], note.is_trouble) for note in stage.keeper.notes]
    assert texts == [
        ("ended: killed by SIGKILL", True),
        ("could not be started again: no memory", True),
        ("is up again", False),
    ]
    assert stage.keeper.restarts == 2
    assert begin_s < stage.keeper.since_s <= stage.keeper.notes[-1].time_s
    assert stage.keeper.slots_left == 63


async def test_a_core_that_does_not_answer_is_killed_and_replaced(stage: Stage) -> None:
    before = value(metrics.shard_restarts, "stalled")
    (core,) = stage.cores
    core.stopped = True
    await stage.until(UP, 2)
    assert core.ends == ["killed"]
    assert value(metrics.shard_restarts, "stalled") == before + 1


async def test_a_core_that_says_that_it_is_dead_is_not_waited_for(stage: Stage) -> None:
    (core,) = stage.cores
    core.shard.broken = True
    await stage.until(UP, 2)
    assert core.ends == ["killed"]


async def test_a_start_that_fails_is_tried_again(stage: Stage) -> None:
    before = value(metrics.shard_restarts, "start_failed")
    stage.planned = [CoreFailed("no memory"), RuntimeError("bug")]
    stage.cores[0].died.set()
    async with asyncio.timeout(TIMEOUT_S):
        while stage.planned:
            await asyncio.sleep(0)
    await stage.until(UP, 2)
    assert value(metrics.shard_restarts, "start_failed") == before + 2


async def test_a_core_that_dies_while_it_is_new_is_replaced_too(stage: Stage) -> None:
    hanging, dying = FakeCore(), FakeCore()
    hanging.hangs_at_first = True
    stage.planned = [hanging, dying]
    stage.may_prepare.clear()
    stage.cores[0].died.set()
    await stage.until(REBUILDING, 2)
    hanging.died.set()
    await stage.until(WARMING, 3)
    dying.died.set()
    await stage.until(DEAD, 3)
    stage.may_prepare.set()
    await stage.until(UP, 4)
    assert [core.ends for core in stage.cores] == [["killed"]] * 3 + [[]]
    assert stage.told.count("admitted up") == 1


async def test_a_core_that_dies_before_the_host_is_its_client_is_replaced_too(
    stage: Stage, caplog: pytest.LogCaptureFixture
) -> None:
    dying = FakeCore()
    dying.greets = False
    stage.planned = [dying]
    stage.cores[0].died.set()
    await stage.until(UP, 3)
    assert dying.ends == ["killed"]
    assert not any(record.exc_info for record in caplog.records), "it is no bug of ours"


async def test_slots_of_a_core_that_is_gone_abort_nothing(stage: Stage) -> None:
    (core,) = stage.cores
    slot: Any = core
    assert await stage.keeper.abort_client(slot) == 3
    core.died.set()
    await stage.until(UP, 2)
    assert await stage.keeper.abort_client(slot) == 0, "another worker may have that number now"


async def test_a_core_is_renewed_in_order_and_that_is_no_death(stage: Stage) -> None:
    before = value(metrics.shard_restarts, "renewed")
    (core,) = stage.cores
    stage.may_prepare.clear()
    renewing = asyncio.create_task(stage.keeper.renew())
    await stage.until(WARMING, 2)
    assert core.ends == ["in order"] and core.shard.called[-1] == "gateway_stop"
    assert core.shard.closed and core.shard.dead.is_set()
    await asyncio.sleep(0)
    assert stage.told == ["lost rebuilding", "prepares warming"] and not renewing.done()
    stage.may_prepare.set()
    await asyncio.wait_for(renewing, TIMEOUT_S)
    assert (stage.keeper.state, stage.told[2:]) == (UP, ["admitted up"])
    assert value(metrics.shard_restarts, "renewed") == before + 1
    assert stage.keeper.last_death is None and stage.keeper.restarts == 1
    await asyncio.sleep(0.02)
    assert len(stage.cores) == 2, "it is renewed once"


async def test_a_core_that_is_not_renewed_is_started_until_it_is_up(stage: Stage) -> None:
    stage.planned = [CoreFailed("no memory")]
    await asyncio.wait_for(stage.keeper.renew(), TIMEOUT_S)
    assert (stage.keeper.state, stage.keeper.restarts) == (UP, 2)
    assert stage.keeper.last_death is not None
    assert stage.keeper.last_death.reason == "could not be started again: no memory"
    assert stage.told == ["lost rebuilding", "lost dead", "prepares warming", "admitted up"]


async def test_renewals_open_no_breaker(stage: Stage) -> None:
    for _ in range(5):
        await asyncio.wait_for(stage.keeper.renew(), TIMEOUT_S)
    stage.cores[-1].died.set()
    await stage.until(UP, 7)
    assert stage.keeper.next_start_s is None


async def test_a_core_that_dies_instead_is_as_good_as_renewed(stage: Stage) -> None:
    stage.may_prepare.clear()
    stage.cores[0].died.set()
    await stage.until(WARMING, 2)
    renewing = asyncio.create_task(stage.keeper.renew())
    await asyncio.sleep(0)
    stage.may_prepare.set()
    await asyncio.wait_for(renewing, TIMEOUT_S)
    await asyncio.sleep(0.02)
    assert (stage.keeper.state, len(stage.cores)) == (UP, 2)


async def test_a_death_is_told_and_so_is_a_wait(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage.cores[0].died.set()
    await stage.until(UP, 2)
    assert stage.keeper.last_death is not None
    assert stage.keeper.last_death.reason == "killed by SIGKILL"
    for count in (2, 3):
        stage.cores[-1].died.set()
        await stage.until(UP if count == 2 else DEAD, min(count + 1, 3))
    async with asyncio.timeout(TIMEOUT_S):
        while stage.keeper.next_start_s is None:
            await asyncio.sleep(0)
    assert 0 < stage.keeper.next_start_s - time.time() <= 1.0, "the breaker is open"


async def test_before_the_gateway_serves_a_death_ends_it(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage.run_dir /= "other"
    stage.run_dir.mkdir()
    starting = stage.keeper_with()
    await starting.start()
    stage.cores[-1].died.set()
    with pytest.raises(CoreFailed, match="shard-1 ended: killed by SIGKILL; the gateway ends"):
        await starting.keep(stage)
    await starting.stop()
    assert starting.state is STOPPED


async def test_a_core_that_lives_is_ended_in_order(stage: Stage) -> None:
    (core,) = stage.cores
    await stage.keeper.stop()
    assert core.ends == ["in order"] and core.shard.called[-1] == "gateway_stop"
    assert core.shard.closed


async def test_all_are_told_what_a_core_computed_whose_record_stays_until_the_next_one_died(
    stage: Stage,
) -> None:
    for count in (2, 3, 4):
        core = stage.cores[-1]
        core.record.begin([tag("a", count)], [], [""])
        core.code = -11
        core.died.set()
        await stage.until(UP, count)
        assert stage.deaths[-1].crashed and core.shard.verdict
        assert {request.fingerprint for request in stage.deaths[-1].steps.fresh} == {count}
    assert {path.name for path in stage.run_dir.iterdir()} == {"shard-1-2.steps", "shard-1-3.steps"}
