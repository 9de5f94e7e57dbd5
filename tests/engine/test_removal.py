"""A version leaves its shard when nothing runs on it, and comes back only if it may."""

from __future__ import annotations

import asyncio

import pytest

from engine import residency as module
from engine.errors import AdapterLoadFailed, ShardUnavailable
from engine.residency import Residency
from tests.engine.crowd import Core, Crowd, Stock
from tests.engine.stage import A, B, happens, settled, stage, started


async def test_what_leaves_waits_for_holds_everywhere_and_for_the_core() -> None:
    async with stage(1, processes=2) as at:
        one, other = at.crowd.processes
        holds = [await process.residents.hold(A) for process in (one, other)]
        other.begin(holds[1].version)
        leaving = asyncio.create_task(at.residency.remove(A))
        await settled()
        assert at.residency.place(A) is None and at.residency.resident() == []
        one.residents.release(holds[0])
        other.residents.release(holds[1])  # aborted, and the core has not read it yet
        await asyncio.sleep(0.03)
        assert not leaving.done() and at.core.keys == {A}
        other.forget(holds[1].version)
        await leaving
        assert at.core.keys == set() and at.counts[-1] == 0


async def test_a_removal_that_the_shard_does_not_do_raises() -> None:
    async with stage(1) as at:
        await at.use(A)
        at.core.dead = True
        with pytest.raises(ShardUnavailable):
            await at.residency.remove(A)
        with pytest.raises(ShardUnavailable):
            await at.residency.remove(A)


async def test_what_the_shard_may_hold_still_keeps_its_place_until_it_is_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "UNLOAD_RETRY_S", 0.001)
    async with stage(1) as at:
        await at.use(A)
        at.core.unloads_fail = 3
        with pytest.raises(ShardUnavailable):
            await at.residency.remove(A)
        assert at.core.keys == {A} and at.counts[-1] == 1
        await at.use(B)  # the core would refuse one too many
        assert at.core.keys == {B} and at.core.unloads_fail == 0
        assert caplog.text.count("may not be removed yet") == 1


async def test_what_the_shard_could_not_remove_is_loaded_again_once_it_is_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "UNLOAD_RETRY_S", 0.001)
    async with stage(2) as at:
        await at.use(A)
        at.core.unloads_fail = 3
        with pytest.raises(ShardUnavailable):
            await at.residency.remove(A)
        await at.use(A)
        assert at.core.loads == [A, A] and at.core.unloads_fail == 0


async def test_what_is_not_there_is_removed() -> None:
    async with stage(1) as at:
        await at.residency.remove(A)
        assert at.core.loads == []


async def test_what_is_being_loaded_is_removed_after_that() -> None:
    async with stage(1) as at:
        at.core.may_load.clear()
        waiting = started(at.process.residents.hold(A))
        await settled()
        removed = asyncio.create_task(at.residency.remove(A))
        await settled()
        at.core.may_load.set()
        resident = await waiting
        await settled()
        assert not removed.done(), "whoever waited holds it"
        at.process.residents.release(resident)
        await removed
        assert at.core.keys == set()


async def test_what_is_wanted_while_it_leaves_comes_back_if_it_may() -> None:
    async with stage(1) as at:
        residents = at.process.residents
        resident = await residents.hold(A)
        removed = [asyncio.create_task(at.residency.remove(A)) for _ in range(2)]
        await settled()
        again = started(residents.hold(A))
        await settled()
        residents.release(resident)
        await asyncio.gather(*removed)
        assert (await again).version.key == A
        assert at.core.loads == [A, A]


async def test_what_is_wanted_while_it_leaves_for_good_is_refused() -> None:
    async with stage(1) as at:
        residents = at.process.residents
        resident = await residents.hold(A)
        removed = asyncio.create_task(at.residency.remove(A))
        at.stock.refused[A] = "it is DRAINING"
        await settled()
        again = started(residents.hold(A))
        await settled()
        assert not again.done()
        residents.release(resident)
        await removed
        with pytest.raises(AdapterLoadFailed, match="it is DRAINING"):
            await again
        assert at.core.keys == set() and at.core.loads == [A]


async def test_a_cancelled_removal_goes_on() -> None:
    async with stage(1) as at:
        resident = await at.process.residents.hold(A)
        removed = asyncio.create_task(at.residency.remove(A))
        await settled()
        removed.cancel()
        await asyncio.gather(removed, return_exceptions=True)
        at.process.residents.release(resident)
        await happens(lambda: not at.core.keys)


async def test_who_shares_out_slots_is_told_when_nobody_holds_it_before_it_is_removed() -> None:
    told: list[tuple[object, bool]] = []
    core, stock = Core(1), Stock(A)
    crowd = Crowd(core)
    residency = Residency(
        core, 1, stock, crowd, left=lambda key: told.append((key, key in core.keys))
    )
    crowd.serve(residency)
    runs = asyncio.create_task(residency.run())
    residents = crowd.processes[0].residents
    resident = await residents.hold(A)
    removal = asyncio.create_task(residency.remove(A))
    await settled()
    assert not told
    residents.release(resident)
    await removal
    assert told == [(A, True)]
    runs.cancel()
    await asyncio.gather(runs, return_exceptions=True)
    await residents.close()
