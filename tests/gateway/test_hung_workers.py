"""A worker that hangs is ended, and nobody waits for it any more."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import pytest
from prometheus_client import REGISTRY

from engine.residents import Residents
from gateway import silence
from gateway import workers as workers_module
from gateway.messages import Leave, Question, RecallSlot, TellUses
from gateway.processes import Processes
from gateway.worker_process import WorkerState
from tests.engine.open_slots import open_slots
from tests.gateway.conftest import ALPHA
from tests.gateway.scripted_worker import SILENT, ScriptedWorker, serving_fleet

SHARD = "shard-0"
STALL_TIMEOUT_S = 0.5
TIMEOUT_S = 20.0


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(silence, "STEP_S", 0.05)
    monkeypatch.setattr(workers_module, "ATTACH_TIMEOUT_S", 0.5)


def answer(worker: ScriptedWorker, question: Question) -> Any:
    return {} if isinstance(question, TellUses) else None


def processes_of(fleet: Any) -> Processes:
    async def nothing_in_core(lora_int_id: int) -> int:
        return 0

    processes = Processes(fleet)
    processes.add_own(SHARD, Residents(lambda key: None, nothing_in_core, open_slots()))
    return processes


def stalls() -> float:
    return REGISTRY.get_sample_value("gateway_worker_stalls_total") or 0.0


@pytest.mark.parametrize("what", ["recall", "leave"])
async def test_a_hung_worker_is_killed_and_what_waits_for_it_goes_on(
    what: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    before = stalls()
    async with serving_fleet(monkeypatch, 2, answer, stall_timeout_s=STALL_TIMEOUT_S) as (
        fleet,
        (hung, other),
    ):
        processes = processes_of(fleet)
        hung.hangs = True
        begin_s = asyncio.get_running_loop().time()
        async with asyncio.timeout(TIMEOUT_S):
            if what == "recall":
                await processes.recall(SHARD, ALPHA.key)
            else:
                await processes.leave(SHARD, ALPHA.key)
            assert asyncio.get_running_loop().time() - begin_s >= STALL_TIMEOUT_S
            await fleet.wait_serving()  # the standby has taken over
        asked = RecallSlot(SHARD, ALPHA.key) if what == "recall" else Leave(SHARD, ALPHA.key)
        assert [message.question for message in other.heard[1:]] == [asked]  # type: ignore[union-attr]
        assert (hung.state, other.state) == (WorkerState.ENDED, WorkerState.SERVING)
        assert stalls() == before + 1
        texts = [note.text for note in fleet.notes]
        assert texts == [
            f"worker {hung.pid} has not answered for {STALL_TIMEOUT_S:g} s: killed",
            f"worker {hung.pid} died while serving (exit code -9)",
        ]
        assert all(note.is_trouble for note in fleet.notes)
        errors = [r.getMessage() for r in caplog.records if r.levelno == logging.ERROR]
        assert errors == texts


async def test_a_worker_that_answers_late_or_has_much_to_end_is_left_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What it is asked to end may run for as long as its callers like."""

    def script(worker: ScriptedWorker, question: Question) -> Any:
        return SILENT

    async with serving_fleet(monkeypatch, 1, script, stall_timeout_s=STALL_TIMEOUT_S) as (
        fleet,
        (worker,),
    ):
        leaving = asyncio.create_task(processes_of(fleet).leave(SHARD, ALPHA.key))
        await asyncio.sleep(3 * STALL_TIMEOUT_S)
        assert worker.state is WorkerState.SERVING and not leaving.done()
        assert not fleet.notes
        leaving.cancel()
        await asyncio.wait((leaving,))


async def test_one_that_hangs_before_it_serves_is_replaced(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(workers_module, "RETRY_DELAY_S", 0.01)
    async with serving_fleet(monkeypatch, 2, answer, stall_timeout_s=STALL_TIMEOUT_S) as (
        fleet,
        (first, _),
    ):
        async with asyncio.timeout(TIMEOUT_S):
            while len(first.born) < 3 or first.born[2].state is not WorkerState.STANDBY:
                await asyncio.sleep(0.01)
            reserve = first.born[2]
            reserve.hangs = True
            first.kill()
            while len(fleet.notes) < 3:
                await asyncio.sleep(0.01)
            await fleet.wait_serving()
        assert [note.text for note in fleet.notes] == [
            f"worker {first.pid} died while serving (exit code -9)",
            f"worker {reserve.pid} has not answered for {STALL_TIMEOUT_S:g} s: killed",
            f"worker {reserve.pid} died while attaching (exit code -9)",
        ]
