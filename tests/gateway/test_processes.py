"""Questions to all processes: every answer counts, the dead are not waited for, nor the silent."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import pytest

from engine.errors import AdapterLoadFailed
from engine.generation import VersionKey
from engine.pool import ServedAdapter
from engine.quarantine import Quarantined
from engine.residents import Residents, Use
from engine.split import Split
from gateway import processes as processes_module
from gateway.messages import (
    Answer,
    Ask,
    Ended,
    Flush,
    FollowQuarantine,
    Leave,
    Loaded,
    LoadFailed,
    Orders,
    Question,
    RecallSlot,
    ShardDied,
    ShardUp,
    ShowAdapter,
    SlotGranted,
    SlotWithdrawn,
    TellUses,
    Unasked,
)
from gateway.processes import Processes
from gateway.worker_process import WorkerProcess
from gateway.workers import WorkerFleet
from store.records import Arm
from tests.engine.open_slots import open_slots
from tests.gateway.conftest import ALPHA
from tests.gateway.outcomes import outcome
from tests.gateway.scripted_worker import SILENT, ScriptedWorker, serving_fleet

BETA = VersionKey("default", "beta", 1)
SHARD = "shard-0"
SHOWN = ServedAdapter(Split([Arm(3, 1)]), (3,))
SHORT_S = 0.2
TIMEOUT_S = 5.0


async def nothing_in_core(lora_int_id: int) -> int:
    return 0


@pytest.fixture
def residents() -> Residents:
    """The host's own, with `alpha`."""
    residents = Residents(lambda key: None, nothing_in_core, open_slots())
    residents.loaded(ALPHA)
    return residents


def processes_of(fleet: WorkerFleet, residents: Residents) -> Processes:
    processes = Processes(fleet)
    processes.add_own(SHARD, residents)
    return processes


async def test_uses_of_all_processes_are_added_up(
    monkeypatch: pytest.MonkeyPatch, residents: Residents
) -> None:
    await residents.hold(ALPHA.key)
    uses = iter([{ALPHA.key: Use(2, 1.0), BETA: Use(0, 7.0)}, {ALPHA.key: Use(0, 1e12)}])

    def script(worker: ScriptedWorker, question: Question) -> Any:
        return next(uses) if question == TellUses(SHARD) else None

    async with serving_fleet(monkeypatch, 2, script) as (fleet, _):
        total = await processes_of(fleet, residents).uses(SHARD)
    assert total == {ALPHA.key: Use(3, 1e12), BETA: Use(0, 7.0)}


async def test_a_silent_worker_is_left_out_and_the_others_count(
    monkeypatch: pytest.MonkeyPatch, residents: Residents, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(processes_module, "ANSWER_TIMEOUT_S", SHORT_S)
    silent: list[ScriptedWorker] = []

    def script(worker: ScriptedWorker, question: Question) -> Any:
        if not silent:
            silent.append(worker)
        return SILENT if worker in silent else {BETA: Use(4, 2.0)}

    async with serving_fleet(monkeypatch, 2, script) as (fleet, _):
        total = await processes_of(fleet, residents).uses(SHARD)
    assert total == {ALPHA.key: Use(0, 0.0), BETA: Use(4, 2.0)}
    assert "does not answer" in caplog.text


async def test_a_late_answer_is_no_answer_to_another_question(
    monkeypatch: pytest.MonkeyPatch, residents: Residents
) -> None:
    """A worker that was stopped for a while answers everything at once."""
    monkeypatch.setattr(processes_module, "ANSWER_TIMEOUT_S", SHORT_S)
    tickets: list[int] = []

    def script(worker: ScriptedWorker, question: Question) -> Any:
        tickets.extend(message.ticket for message in worker.heard if isinstance(message, Ask))
        if len(tickets) == 1:
            return SILENT
        worker.host.send(Answer(tickets[0], {BETA: Use(9, 9.0)}))
        return {}

    async with serving_fleet(monkeypatch, 1, script) as (fleet, _):
        processes = processes_of(fleet, residents)
        assert await processes.uses(SHARD) == {ALPHA.key: Use(0, 0.0)}
        assert await processes.uses(SHARD) == {ALPHA.key: Use(0, 0.0)}


async def test_a_change_is_sent_before_anybody_waits_for_it(
    monkeypatch: pytest.MonkeyPatch, residents: Residents
) -> None:
    """So that changes arrive in the order in which they were made."""

    def script(worker: ScriptedWorker, question: Question) -> Any:
        return None

    async with serving_fleet(monkeypatch, 2, script) as (fleet, workers):
        processes = processes_of(fleet, residents)
        first = processes.show("default", "alpha", SHOWN)
        processes.loaded(SHARD, ALPHA)
        second = processes.show("default", "beta", SHOWN)
        await second
        await first
        for worker in workers:
            told = [
                message.question if isinstance(message, Ask) else message
                for message in worker.heard
                if not isinstance(message, Orders)
            ]
            assert [type(message) for message in told] == [ShowAdapter, Loaded, ShowAdapter]
            assert [q.adapter for q in told if isinstance(q, ShowAdapter)] == ["alpha", "beta"]


async def test_a_change_does_not_wait_for_ever_for_a_worker_that_does_not_follow(
    monkeypatch: pytest.MonkeyPatch, residents: Residents, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(processes_module, "FOLLOW_TIMEOUT_S", SHORT_S)

    def script(worker: ScriptedWorker, question: Question) -> Any:
        return SILENT

    async with serving_fleet(monkeypatch, 1, script) as (fleet, _):
        async with asyncio.timeout(TIMEOUT_S):
            await processes_of(fleet, residents).show("default", "alpha", SHOWN)
    errors = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert any("does not follow" in record.getMessage() for record in errors)


async def test_what_was_loaded_or_not_is_told_to_all(
    monkeypatch: pytest.MonkeyPatch, residents: Residents
) -> None:
    def script(worker: ScriptedWorker, question: Question) -> Any:
        return None

    async with serving_fleet(monkeypatch, 2, script) as (fleet, workers):
        processes = processes_of(fleet, residents)
        held = asyncio.create_task(residents.hold(BETA))
        await asyncio.sleep(0)
        processes.failed(SHARD, BETA, "no room")
        processes.loaded(SHARD, ALPHA)
        await fleet.ask(Flush())  # read after them
        for worker in workers:
            assert LoadFailed(SHARD, BETA, "no room") in worker.heard
            assert Loaded(SHARD, ALPHA) in worker.heard
        with pytest.raises(AdapterLoadFailed, match="no room"):
            await held


async def test_a_version_has_left_once_all_processes_say_so(
    monkeypatch: pytest.MonkeyPatch, residents: Residents
) -> None:
    asked = asyncio.Event()

    def script(worker: ScriptedWorker, question: Question) -> Any:
        if question == Leave(SHARD, ALPHA.key):
            asked.set()
        return None

    async with serving_fleet(monkeypatch, 2, script) as (fleet, _):
        held = await residents.hold(ALPHA.key)
        leaving = asyncio.create_task(processes_of(fleet, residents).leave(SHARD, ALPHA.key))
        await asked.wait()
        assert not leaving.done(), "the host itself still runs a probe on it"
        residents.release(held)
        async with asyncio.timeout(TIMEOUT_S):
            await leaving


async def test_slots_are_granted_and_withdrawn_for_all_at_once(
    monkeypatch: pytest.MonkeyPatch, residents: Residents
) -> None:
    def script(worker: ScriptedWorker, question: Question) -> Any:
        return None

    async with serving_fleet(monkeypatch, 2, script) as (fleet, workers):
        processes = processes_of(fleet, residents)
        processes.granted(SHARD, BETA)
        assert set(residents.slots._slots) == {BETA}
        processes.withdrawn(SHARD, BETA)
        assert not residents.slots._slots
        await fleet.ask(Flush())  # read after them
        for worker in workers:
            told = [m for m in worker.heard if isinstance(m, SlotGranted | SlotWithdrawn)]
            assert told == [SlotGranted(SHARD, BETA), SlotWithdrawn(SHARD, BETA)]


async def test_a_slot_is_recalled_before_anybody_waits_and_back_when_all_say_so(
    monkeypatch: pytest.MonkeyPatch, residents: Residents
) -> None:
    asked = asyncio.Event()

    def script(worker: ScriptedWorker, question: Question) -> Any:
        if question == RecallSlot(SHARD, ALPHA.key):
            asked.set()
            return SILENT
        return None

    async with serving_fleet(monkeypatch, 1, script) as (fleet, (worker,)):
        processes = processes_of(fleet, residents)
        processes.granted(SHARD, ALPHA.key)
        slot = residents.slots.enter(ALPHA.key, ALPHA.lora_int_id)
        assert slot is not None
        returned = processes.recall(SHARD, ALPHA.key)
        processes.granted(SHARD, BETA)
        assert set(residents.slots._slots) == {BETA}
        returning = asyncio.ensure_future(returned)
        async with asyncio.timeout(TIMEOUT_S):
            await asked.wait()
            tickets = [m.ticket for m in worker.heard if isinstance(m, Ask)]
            worker.host.send(Answer(tickets[-1]))
            await fleet.ask(Flush())  # the answer is read
            assert not returning.done(), "the host itself still runs a probe in it"
            residents.slots.leave(slot)
            await returning
        order = [type(m.question) if isinstance(m, Ask) else type(m) for m in worker.heard]
        assert order[-4:-1] == [SlotGranted, RecallSlot, SlotGranted]


async def test_a_worker_that_dies_has_answered_once_its_requests_are_aborted(
    monkeypatch: pytest.MonkeyPatch, residents: Residents
) -> None:
    asked, aborted, cleaning = asyncio.Event(), asyncio.Event(), asyncio.Event()

    def script(worker: ScriptedWorker, question: Question) -> Any:
        asked.set()
        return SILENT

    async def after_death(worker: WorkerProcess) -> None:
        cleaning.set()
        await aborted.wait()

    async with serving_fleet(monkeypatch, 1, script, after_death=after_death) as (fleet, (worker,)):
        leaving = asyncio.create_task(processes_of(fleet, residents).leave(SHARD, ALPHA.key))
        async with asyncio.timeout(TIMEOUT_S):
            await asked.wait()
            worker.kill()
            await cleaning.wait()
            assert not leaving.done(), "the core may still run what it had sent"
            aborted.set()
            await leaving


async def test_outcomes_arrive_before_a_flush_returns(
    monkeypatch: pytest.MonkeyPatch, residents: Residents
) -> None:
    heard: list[Unasked] = []

    def script(worker: ScriptedWorker, question: Question) -> Any:
        worker.host.send(Ended([outcome(request_id=f"of-{worker.number}")]))

    async with serving_fleet(monkeypatch, 3, script, hear=heard.append) as (fleet, workers):
        await processes_of(fleet, residents).flush()
        told = {end.request_id for message in heard for end in outcomes_in(message)}
        assert told == {f"of-{worker.number}" for worker in workers}


async def test_a_standby_is_asked_nothing_and_told_nothing(
    monkeypatch: pytest.MonkeyPatch, residents: Residents
) -> None:
    """It gets all there is with its orders."""

    def script(worker: ScriptedWorker, question: Question) -> Any:
        return None

    async with serving_fleet(monkeypatch, 1, script) as (fleet, (worker,)):
        await processes_of(fleet, residents).show("default", "alpha", SHOWN)
        reserve = [other for other in worker.born if other is not worker]
        assert len(reserve) == 1
        assert not reserve[0].heard


async def test_without_workers_nobody_is_waited_for(residents: Residents) -> None:
    async def nothing(worker: WorkerProcess) -> None:
        return None

    def no_orders() -> Any:
        raise AssertionError

    processes = processes_of(WorkerFleet(0, no_orders, nothing, lambda message: None), residents)
    async with asyncio.timeout(TIMEOUT_S):
        await processes.show("default", "alpha", SHOWN)
        assert await processes.uses(SHARD) == {ALPHA.key: Use(0, 0.0)}
        await processes.leave(SHARD, ALPHA.key)
        assert await processes.uses(SHARD) == {}


def outcomes_in(message: Unasked) -> list[Any]:
    return list(message.outcomes) if isinstance(message, Ended) else []


async def test_what_is_quarantined_is_followed_by_all_workers(
    monkeypatch: pytest.MonkeyPatch, residents: Residents
) -> None:
    asked: list[Question] = []

    def script(worker: ScriptedWorker, question: Question) -> Any:
        asked.append(question)

    held = Quarantined(versions={"acme/alpha@1": 1.0})
    async with serving_fleet(monkeypatch, 2, script) as (fleet, _):
        async with asyncio.timeout(TIMEOUT_S):
            await processes_of(fleet, residents).screen(held)
    assert asked == [FollowQuarantine(held)] * 2


class Slot:
    """A worker's way into a new core."""

    def __init__(self) -> None:
        self.closed = 0

    def close(self) -> None:
        self.closed += 1


async def test_each_worker_gets_a_slot_of_its_own_on_a_shard_that_is_back(
    monkeypatch: pytest.MonkeyPatch, residents: Residents
) -> None:
    taken: list[Any] = []

    def take_slot() -> Any:
        taken.append(Slot())
        return taken[-1]

    def script(worker: ScriptedWorker, question: Question) -> Any:
        assert isinstance(question, ShardUp) and question.resident == [ALPHA]
        assert question.granted == [ALPHA.key]
        return None

    async with serving_fleet(monkeypatch, 2, script) as (fleet, workers):
        processes = processes_of(fleet, residents)
        processes.lose(SHARD, True, Quarantined(requests={7: 1.0}))
        async with asyncio.timeout(TIMEOUT_S):
            await processes.admit(SHARD, [ALPHA], [ALPHA.key], take_slot)
        assert len(taken) == 2 and {worker.slots[-1] for worker in workers} == set(taken)
        assert [slot.closed for slot in taken] == [1, 1], "they have copies of their own"
        for worker in workers:
            (died,) = (message for message in worker.heard if isinstance(message, ShardDied))
            assert died.crashed and died.quarantined.requests == {7: 1.0}


async def test_of_a_shard_that_is_gone_the_host_uses_nothing(residents: Residents) -> None:
    async def nothing(worker: WorkerProcess) -> None:
        return None

    def no_orders() -> Any:
        raise AssertionError

    processes = processes_of(WorkerFleet(0, no_orders, nothing, lambda message: None), residents)
    processes.drop_own(SHARD)
    processes.loaded(SHARD, ALPHA)
    processes.failed(SHARD, ALPHA.key, "gone")
    processes.granted(SHARD, ALPHA.key)
    processes.withdrawn(SHARD, ALPHA.key)
    async with asyncio.timeout(TIMEOUT_S):
        assert await processes.uses(SHARD) == {}
