"""Desks that lend: who waits, what is told and in which order, and when a device goes back."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from engine.ring import ShardLent
from gateway import lending_desk, metrics
from gateway.drains import Drains, Wish
from gateway.keeper_state import KeeperState
from gateway.lending import Lending
from gateway.lent_memory import LentMemory
from gateway.loan import Loan
from lora_gateway.v1 import admin_pb2
from tests.gateway.control_plane import KILLED, TIMEOUT_S, Plane, control_plane
from tests.gateway.three_shards import drains_of, no_slot, shards
from trainer.devices import Device
from trainer.events import Notice

CPU = Device("cpu")


class Job:
    """One that borrows, and what it hears."""

    def __init__(self, lending: Lending, uid: str) -> None:
        self.lending = lending
        self.uid = uid
        self.told: list[Notice] = []
        self.recalled = asyncio.Event()
        self.borrowing = asyncio.create_task(self._borrow())

    async def _borrow(self) -> None:
        async def tell(notice: Notice) -> None:
            self.told.append(notice)

        await self.lending.borrow(CPU, self.uid, tell, self.recalled.set)

    async def has_it(self) -> None:
        async with asyncio.timeout(TIMEOUT_S):
            await asyncio.shield(self.borrowing)

    def give_back(self, *, publishes: bool = False) -> None:
        self.lending.give_back(CPU, self.uid, publishes=publishes)

    async def outage(self) -> Notice | None:
        async with asyncio.timeout(TIMEOUT_S):
            await self.lending.returned(self.uid)
        return self.lending.outage(self.uid)


class Keeper:
    """Lends as a `ShardKeeper` does, without a core."""

    def __init__(self, plane: Plane, name: str) -> None:
        self.plane = plane
        scripted: Any = plane.keepers[name]
        scripted.lend, scripted.note = self.lend, self.note
        self.scripted = scripted
        self.name = name
        self.notes: list[str] = []
        self.loans: list[Loan] = []
        self.tasks: list[asyncio.Task[None]] = []

    def lend(self) -> Loan:
        self.loans.append(Loan())
        self.tasks.append(asyncio.create_task(self._lend(self.loans[-1])))
        return self.loans[-1]

    async def _lend(self, loan: Loan) -> None:
        control, shard = self.plane.control, self.plane.shards[self.name]
        assert self.name in control.drained, "nobody is sent there any more"
        self.scripted.state = KeeperState.LENT
        control.lose(self.name, KILLED)
        loan.begun.set_result(False)
        await loan.over.wait()
        await control.prepare(shard)  # type: ignore[arg-type]
        self.scripted.state = KeeperState.UP
        await control.admit(self.name, no_slot)
        loan.ended.set_result(None)

    def note(self, text: str, *, is_trouble: bool = False) -> None:
        self.notes.append(text)


class Stage:
    """A control plane that lends its last shard."""

    def __init__(self, plane: Plane, number: int) -> None:
        lending = plane.control._lending
        assert lending is not None
        self.plane = plane
        self.lending: Lending = lending
        self.drains: Drains = drains_of(plane)
        self.name = f"shard-{number - 1}"
        self.keeper = Keeper(plane, self.name)

    def job(self, uid: str = "j1") -> Job:
        return Job(self.lending, uid)

    @property
    def serves(self) -> bool:
        return self.lending._desks[self.name].serves

    async def until_serves(self) -> None:
        async with asyncio.timeout(TIMEOUT_S):
            while not self.serves or self.plane.control.lent:
                await asyncio.sleep(0.01)


@contextlib.asynccontextmanager
async def stage(
    folder: Path, monkeypatch: pytest.MonkeyPatch, *, number: int = 1, **settings: Any
) -> AsyncIterator[Stage]:
    monkeypatch.setattr(lending_desk, "LOOK_INTERVAL_S", 0.02)
    options = {"lend_shards": "always", "lend_rest_s": 0.0, **settings}
    async with control_plane(folder, monkeypatch, shards=number, **options) as plane:
        yield Stage(plane, number)


async def test_a_shard_is_announced_drained_put_away_and_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = metrics.shard_lent_duration.labels("shard-0")._sum.get()
    async with stage(tmp_path, monkeypatch) as at:
        await at.plane.ready("sql")
        job = at.job()
        await job.has_it()
        (notice,) = job.told
        assert notice.code == "DEVICE_LENT" and "refused with SHARD_LENT" in notice.message
        assert at.keeper.notes == [notice.message]
        control = at.plane.control
        assert control.drained == control.lent == {"shard-0"}
        assert control._shards is not None
        with pytest.raises(ShardLent):
            control._shards.pool.route_to(None)
        told = (await shards(at.plane))["shard-0"]
        assert told.state == admin_pb2.SHARD_STATE_LENT and told.drain.by_lending
        assert metrics.shard_lent.labels("shard-0")._value.get() == 1
        job.give_back()
        outage = await job.outage()
        assert outage is not None and "takes requests again after" in outage.message
        assert at.lending.outage("j1") is None, "told once"
        assert not control.drained and not control.lent and at.keeper.notes[1:] == [outage.message]
        assert control.resident["shard-0"], "warm"
        assert metrics.shard_lent.labels("shard-0")._value.get() == 0
        assert metrics.shard_lent_duration.labels("shard-0")._sum.get() > count


async def test_jobs_that_follow_each_other_share_a_loan_but_for_one_that_publishes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with stage(tmp_path, monkeypatch) as at:
        first = at.job("first")
        await first.has_it()
        first.give_back()
        second = at.job("second")
        await second.has_it()
        assert len(at.keeper.loans) == 1 and await first.outage() is None
        assert [notice.code for notice in second.told] == ["DEVICE_LENT"]
        second.give_back(publishes=True)
        third = at.job("third")
        await third.has_it()
        assert len(at.keeper.loans) == 2
        assert at.lending.outage("second") is not None
        third.give_back()
        await at.until_serves()


async def test_after_the_limit_a_job_is_recalled_and_another_waits_until_the_shard_has_rested(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with stage(tmp_path, monkeypatch, lend_limit_s=1.0, lend_rest_s=0.5) as at:
        job = at.job()
        await job.has_it()
        async with asyncio.timeout(TIMEOUT_S):
            await job.recalled.wait()
        other = at.job("other")
        job.give_back()
        await at.until_serves()
        since_s = asyncio.get_running_loop().time()
        await other.has_it()
        assert asyncio.get_running_loop().time() - since_s > 0.4
        assert len(at.keeper.loans) == 2 and not other.recalled.is_set()
        other.give_back()
        await at.until_serves()


async def test_the_last_shard_is_not_lent_where_only_spare_ones_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with stage(tmp_path, monkeypatch, number=2, lend_shards="spare") as at:
        await at.drains.drain("shard-0")
        job = at.job()
        await asyncio.sleep(0.2)
        assert not job.borrowing.done() and not job.told
        await at.drains.resume("shard-0")
        await job.has_it()
        assert "other shards" in job.told[0].message
        control = at.plane.control
        assert control._shards is not None and control._shards.pool.stays_open
        async with asyncio.timeout(TIMEOUT_S), at.lending.serving():
            pass  # at once: another one serves
        job.give_back()
        await at.until_serves()


async def test_nothing_is_lent_while_an_adapter_is_published_and_that_waits_for_a_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with stage(tmp_path, monkeypatch) as at:
        async with at.lending.serving():
            job = at.job()
            await asyncio.sleep(0.2)
            assert not job.borrowing.done()
        await job.has_it()
        entered = asyncio.Event()

        async def publish() -> None:
            async with at.lending.serving():
                assert at.plane.control._shards is not None
                assert at.plane.control._shards.pool.stays_open
                entered.set()

        publishing = asyncio.create_task(publish())
        await asyncio.sleep(0.3)
        assert not entered.is_set()
        job.give_back()
        async with asyncio.timeout(TIMEOUT_S):
            await publishing


async def test_what_runs_gets_its_grace_and_is_cut_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with stage(tmp_path, monkeypatch, drain_grace_s=0.5) as at:
        pool = at.plane.control._shards.pool  # type: ignore[union-attr]
        async with pool.route_to(None).lease():
            job = at.job()
            await asyncio.sleep(0.3)
            assert at.plane.control.drained and not at.keeper.loans
            await job.has_it()
        job.give_back()
        await at.until_serves()


async def test_a_job_that_waits_no_more_borrows_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with stage(tmp_path, monkeypatch, lend_rest_s=0.3) as at:
        job = at.job()
        await asyncio.sleep(0.05)
        job.borrowing.cancel()
        await asyncio.sleep(0.5)
        assert not at.keeper.loans
        late = at.job("late")
        async with asyncio.timeout(TIMEOUT_S):
            while not at.plane.control.drained:
                await asyncio.sleep(0)
        late.borrowing.cancel()  # when the shard is out of the route already
        await at.until_serves()
        assert not at.plane.control.drained


async def test_a_job_that_is_wanted_no_more_as_it_gets_the_device_leaves_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with stage(tmp_path, monkeypatch) as at:
        job = at.job()
        desk = at.lending._desks[at.name]
        let_in = desk._let_in

        async def let_in_and_cancel(memory: LentMemory) -> None:
            await let_in(memory)
            job.borrowing.cancel()  # before it hears of it

        monkeypatch.setattr(desk, "_let_in", let_in_and_cancel)
        async with asyncio.timeout(TIMEOUT_S):
            while not at.keeper.loans:
                await asyncio.sleep(0.01)
        await at.until_serves()
        assert job.borrowing.cancelled()


async def test_a_shard_that_an_operator_has_drained_stays_so_after_it_was_lent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with stage(tmp_path, monkeypatch, number=2) as at:
        await at.drains.drain("shard-1")
        job = at.job()
        await job.has_it()
        job.give_back()
        await at.until_serves()
        assert at.plane.control.drained == {"shard-1"}
        drain = at.drains.drain_of("shard-1")
        assert drain is not None and drain.wishes == {Wish.OPERATOR}


async def test_a_shard_serves_again_when_it_could_not_be_lent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with stage(tmp_path, monkeypatch) as at:
        until_idle, failed = at.drains.until_idle, asyncio.Event()

        async def fail_once(shard: str) -> None:
            if failed.is_set():
                return await until_idle(shard)
            failed.set()
            raise RuntimeError("unforeseen")

        monkeypatch.setattr(at.drains, "until_idle", fail_once)
        job = at.job()
        await job.has_it()
        assert failed.is_set() and len(at.keeper.loans) == 1
        assert [notice.code for notice in job.told] == ["DEVICE_LENT"] * 2
        job.give_back()
        await at.until_serves()


async def test_a_device_on_which_nothing_serves_is_borrowed_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with stage(tmp_path, monkeypatch, lend_shards="never") as at:
        job = at.job()
        await job.has_it()
        job.give_back()
        assert not at.lending.lends(CPU) and not job.told and not at.keeper.loans
