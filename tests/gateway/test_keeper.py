"""A shard through its states: cores that start, die, hang and do not start, over fake ones."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from engine.errors import CoreFailed
from engine.fingerprint import tag
from gateway import metrics
from gateway.keeper_state import KeeperState
from tests.gateway.keeper_stage import TIMEOUT_S, FakeCore, Stage, keeping

UP, DEAD = KeeperState.UP, KeeperState.DEAD
REBUILDING, WARMING, STOPPED = KeeperState.REBUILDING, KeeperState.WARMING, KeeperState.STOPPED


@pytest_asyncio.fixture
async def stage(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> AsyncIterator[Stage]:
    """A keeper whose first core is up, and which keeps."""
    async with keeping(monkeypatch, tmp_path) as at:
        yield at


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
