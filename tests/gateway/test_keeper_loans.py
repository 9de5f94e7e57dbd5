"""A shard's keeper while the device is lent: cores that sleep, end, die asleep and do not wake."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from gateway.keeper_state import KeeperState
from gateway.loan import Loan
from gateway.renewal import LOW_SLOTS
from tests.gateway.keeper_stage import TIMEOUT_S, Stage, keeping

UP, LENT = KeeperState.UP, KeeperState.LENT


@pytest_asyncio.fixture
async def sleeper(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> AsyncIterator[Stage]:
    """A keeper whose cores can sleep."""
    async with keeping(monkeypatch, tmp_path, sleeps=True) as at:
        yield at


@pytest_asyncio.fixture
async def stage(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> AsyncIterator[Stage]:
    """A keeper whose cores cannot."""
    async with keeping(monkeypatch, tmp_path) as at:
        yield at


async def lent(at: Stage) -> tuple[Loan, bool]:
    """A loan that has begun, and whether the core sleeps."""
    loan = at.keeper.lend()
    async with asyncio.timeout(TIMEOUT_S):
        sleeps = await asyncio.shield(loan.begun)
    assert at.keeper.state is LENT
    return loan, sleeps


async def back(loan: Loan) -> None:
    loan.over.set()
    async with asyncio.timeout(TIMEOUT_S):
        await asyncio.shield(loan.ended)


async def test_a_core_that_can_sleep_sleeps_and_wakes_warm(sleeper: Stage) -> None:
    (core,) = sleeper.cores
    loan, sleeps = await lent(sleeper)
    assert sleeps and core.shard.called[-1] == "gateway_sleep"
    assert sleeper.told == ["lost lent"], "nobody uses it in its sleep"
    assert sleeper.keeper.shard is core.shard and not core.shard.dead.is_set()  # type: ignore[comparison-overlap]
    await back(loan)
    assert core.shard.called[-1] == "gateway_wake" and sleeper.cores == [core]
    assert sleeper.told == ["lost lent", "prepares warming", "admitted up"]
    assert (sleeper.keeper.state, sleeper.keeper.restarts) == (UP, 0)


@pytest.mark.parametrize("utility", ["gateway_sleep", "gateway_wake"])
async def test_a_core_that_falls_asleep_or_wakes_up_may_be_silent(
    sleeper: Stage, utility: str
) -> None:
    sleeper.cores[0].is_silent_in = utility
    loan, sleeps = await lent(sleeper)
    assert sleeps
    await back(loan)
    assert len(sleeper.cores) == 1 and not sleeper.cores[0].ends


async def test_a_core_in_its_sleep_may_be_silent(sleeper: Stage) -> None:
    loan, _ = await lent(sleeper)
    sleeper.cores[0].stopped = True
    await asyncio.sleep(0.2)  # four times what a core that is awake may be silent
    assert sleeper.keeper.state is LENT and not sleeper.cores[0].ends
    sleeper.cores[0].stopped = False
    await back(loan)


async def test_a_core_that_cannot_sleep_ends_in_order_and_another_comes(stage: Stage) -> None:
    (core,) = stage.cores
    loan, sleeps = await lent(stage)
    assert not sleeps and core.ends == ["in order"] and core.shard.dead.is_set()
    assert stage.keeper.shard is None and stage.keeper.slots_left == 0
    await back(loan)
    assert stage.told == ["lost lent", "prepares warming", "admitted up"]
    assert (stage.keeper.state, len(stage.cores)) == (UP, 2)


async def test_a_core_with_few_slots_is_replaced_and_not_woken(sleeper: Stage) -> None:
    sleeper.cores[0].slots_left = LOW_SLOTS
    loan, sleeps = await lent(sleeper)
    assert not sleeps and sleeper.cores[0].ends == ["in order"]
    await back(loan)
    assert len(sleeper.cores) == 2


async def test_a_core_that_does_not_fall_asleep_is_killed(sleeper: Stage) -> None:
    sleeper.cores[0].fails["gateway_sleep"] = RuntimeError("Memory usage increased")
    loan, sleeps = await lent(sleeper)
    assert not sleeps and sleeper.cores[0].ends == ["killed"]
    await back(loan)
    assert (sleeper.keeper.state, len(sleeper.cores)) == (UP, 2)


async def test_a_core_that_dies_in_its_sleep_is_replaced_when_the_loan_is_over(
    sleeper: Stage,
) -> None:
    loan, _ = await lent(sleeper)
    sleeper.cores[0].died.set()
    async with asyncio.timeout(TIMEOUT_S):
        while not sleeper.cores[0].ends:
            await asyncio.sleep(0)
    assert sleeper.keeper.state is LENT and len(sleeper.cores) == 1, "its device is not free"
    await back(loan)
    assert (sleeper.keeper.state, len(sleeper.cores)) == (UP, 2)
    assert sleeper.keeper.last_death is not None
    assert "in its sleep" in sleeper.keeper.last_death.reason


async def test_a_core_that_does_not_wake_up_is_replaced(sleeper: Stage) -> None:
    sleeper.cores[0].fails["gateway_wake"] = RuntimeError("CUDA out of memory")
    loan, _ = await lent(sleeper)
    await back(loan)
    assert sleeper.cores[0].ends == ["killed"]
    assert (sleeper.keeper.state, len(sleeper.cores)) == (UP, 2)
    assert any("out of memory" in note.text for note in sleeper.keeper.notes)


async def test_a_core_that_cannot_be_started_again_is_tried_until_it_can(stage: Stage) -> None:
    loan, _ = await lent(stage)
    stage.planned = [RuntimeError("no memory")]
    await back(loan)
    assert (stage.keeper.state, len(stage.cores)) == (UP, 2)


async def test_what_dies_before_it_is_lent_is_lent_when_it_is_up_again(stage: Stage) -> None:
    stage.may_prepare.clear()
    stage.cores[0].died.set()
    await stage.until(KeeperState.WARMING, 2)
    loan = stage.keeper.lend()
    stage.may_prepare.set()
    async with asyncio.timeout(TIMEOUT_S):
        await asyncio.shield(loan.begun)
    assert stage.keeper.state is LENT and stage.cores[1].ends == ["in order"]
    await back(loan)


async def test_a_gateway_that_ends_ends_a_core_in_its_sleep(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    async with keeping(monkeypatch, tmp_path, sleeps=True) as at:
        await lent(at)
    assert at.keeper.state is KeeperState.STOPPED and at.cores[0].ends == ["in order"]
