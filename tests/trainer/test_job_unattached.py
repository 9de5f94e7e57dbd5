"""A run that the gateway cannot find for a while is left alone, and so is its device."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from store.job_records import EventKind, JobState
from tests.trainer.job_stage import TENANT, Stage, stage
from tests.trainer.scripted_worker import Script
from trainer import job_run, jobs, process
from trainer.process import TrainingProcess, is_locked
from trainer.run_folder import RunFolder

RUNS_ON = Script(steps=20, step_s=0.05, wait_for="go")
FIND = TrainingProcess.find


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retries come soon."""
    monkeypatch.setattr(jobs, "RETRY_S", 0.3)
    monkeypatch.setattr(job_run, "RETRY_S", 0.05)
    monkeypatch.setattr(job_run, "MAX_RETRY_S", 0.05)
    monkeypatch.setattr(process, "STARTING_S", 0.1)


def find_by(
    monkeypatch: pytest.MonkeyPatch, find: Callable[[RunFolder], TrainingProcess | None]
) -> None:
    monkeypatch.setattr(TrainingProcess, "find", find)


def out_of_files(*_: object) -> Any:
    raise OSError(errno.EMFILE, "Too many open files")


async def train_on(s: Stage, *, told: int = 20) -> None:
    """The job goes on in the process that it had, and says all that it would have."""
    (s.root / "go").touch()
    job = await s.ended("one")
    assert job.state is JobState.SUCCEEDED, job.error
    assert job.attempt == 1
    steps = [e.payload["step"] for e in await s.events("one") if e.kind is EventKind.PROGRESS]
    assert steps == list(range(1, told + 1))


@pytest.mark.parametrize("number", [errno.EMFILE, errno.EIO])
async def test_a_run_that_cannot_be_looked_for_goes_on_and_keeps_its_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    failed = asyncio.Event()
    loop = asyncio.get_running_loop()

    def fail_once(run: RunFolder) -> TrainingProcess | None:
        find_by(monkeypatch, FIND)
        loop.call_soon_threadsafe(failed.set)
        raise OSError(number, os.strerror(number))

    async with stage(tmp_path) as s:
        await s.create("one", RUNS_ON)
        job = await s.until_step("one", 2)
        processes = s.processes(job)
        await s.create("two")
        await s.until("two", JobState.QUEUED)
        find_by(monkeypatch, fail_once)
        await s.restart()
        await asyncio.wait_for(failed.wait(), 5)
        await s.until_step("one", 20)
        assert s.processes(job) == processes
        assert (await s.job("two")).state is JobState.QUEUED, "one trains on the device"
        await train_on(s)
        assert (await s.ended("two")).state is JobState.SUCCEEDED


async def test_a_run_that_is_not_recognized_at_first_is_not_taken_for_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    missed: list[RunFolder] = []

    def miss(run: RunFolder) -> TrainingProcess | None:
        if len(missed) < 4:
            missed.append(run)
            return None
        return FIND(run)

    async with stage(tmp_path) as s:
        await s.create("one", RUNS_ON)
        job = await s.until_step("one", 2)
        processes = s.processes(job)
        find_by(monkeypatch, miss)
        await s.restart()
        await s.until_step("one", 20)
        assert len(missed) == 4 and s.processes(job) == processes
        await train_on(s)


async def test_a_run_is_not_ended_as_long_as_it_cannot_be_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries = 0

    def miss_then_fail(run: RunFolder) -> TrainingProcess | None:
        nonlocal tries
        tries += 1
        return None if tries == 1 else out_of_files()

    async with stage(tmp_path) as s:
        await s.create("one", RUNS_ON)
        job = await s.until_step("one", 2)
        processes = s.processes(job)
        find_by(monkeypatch, miss_then_fail)
        await s.restart()
        async with asyncio.timeout(20):
            while tries < 3 * job_run.TRIES:
                await asyncio.sleep(0.02)
        assert s.processes(job) == processes
        find_by(monkeypatch, FIND)
        await train_on(s)


async def test_what_a_dead_run_left_over_is_ended_before_the_run_is_judged(tmp_path: Path) -> None:
    async with stage(tmp_path) as s:
        await s.create("one", RUNS_ON.model_copy(update={"fork": True}))
        job = await s.until_step("one", 2)
        await s.stop()
        leader = min(s.processes(job), key=lambda pid: os.getsid(pid) != pid)
        os.kill(leader, signal.SIGKILL)
        async with asyncio.timeout(5):
            while leader in s.processes(job):
                await asyncio.sleep(0.02)
        assert is_locked(s.run_folder(job)), "the fork has the lock too"
        (tmp_path / "go").touch()
        await s.restart()
        job = await s.ended("one")
        assert (job.state, job.attempt) == (JobState.SUCCEEDED, 2)
        assert not s.processes(job)
        await s.create("two")
        assert (await s.ended("two")).state is JobState.SUCCEEDED, "the device is free"


async def test_a_run_that_was_not_found_is_asked_to_save_when_it_is_cancelled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with stage(tmp_path) as s:
        await s.create("one", Script(steps=10_000, step_s=0.05))
        await s.until_step("one", 2)
        find_by(monkeypatch, lambda run: None)
        await s.restart()
        await asyncio.sleep(0.2)
        find_by(monkeypatch, FIND)
        await s.jobs.cancel(TENANT, "one", discard=False)
        assert (await s.ended("one")).state is JobState.CANCELLED
        assert len(await s.jobs.checkpoints(TENANT, "one")) == 1
