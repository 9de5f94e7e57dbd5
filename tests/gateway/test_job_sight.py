"""Jobs and their curves, read from the store as they grow."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from gateway import job_sight as module
from gateway.job_sight import ACTIVE_SHOWN, ENDED_SHOWN, JobSight
from gateway.status import JobStatus
from store.job_records import EventKind, JobChange, JobRecord, JobState, NewEvent
from store.sqlite_jobs import SqliteJobs
from tests.store.job_steps import bring_to, new_job

TENANT = "acme"


@pytest_asyncio.fixture(loop_scope="session")
async def store(tmp_path: Path) -> AsyncIterator[SqliteJobs]:
    async with SqliteJobs(tmp_path / "jobs.sqlite") as store:
        yield store


async def train(store: SqliteJobs, job: JobRecord, steps: range, **last: Any) -> JobRecord:
    """Tell of steps whose loss is 10 less their number."""
    progress = [
        {"step": step, "total_steps": 10, "loss": 10.0 - step, "eta_s": 4.5, "epoch": 0.5}
        for step in steps
    ]
    progress[-1].update(last)
    events = [NewEvent(EventKind.PROGRESS, payload) for payload in progress]
    return await store.change_job(job, JobChange(progress=progress[-1], events=events))


@dataclass
class Sights:
    """A store, and who waits, in order."""

    jobs: SqliteJobs
    waiting: Sequence[str] = ()

    def queue_position(self, job: JobRecord) -> int:
        return self.waiting.index(job.uid) + 1 if job.uid in self.waiting else 0


async def shown(sight: JobSight, store: SqliteJobs) -> JobStatus:
    (job,), _ = await sight.read(Sights(store), TENANT)
    return job


async def test_a_running_job_is_told_with_its_curve_as_it_grows(store: SqliteJobs) -> None:
    sight = JobSight()
    job = await bring_to(store, JobState.RUNNING, new_job("sql-1"))
    assert (await shown(sight, store)).curve == []
    job = await train(store, job, range(1, 4))
    told = await shown(sight, store)
    assert (told.name, told.adapter, told.state, told.is_final) == (
        "sql-1",
        "sql",
        "running",
        False,
    )
    assert (told.step, told.total_steps, told.loss, told.eta_s) == (3, 10, 7.0, 4.5)
    assert told.curve == [(1, 9.0), (2, 8.0), (3, 7.0)]
    job = await train(store, job, range(4, 6), eval_loss=5.5)
    told = await shown(sight, store)
    assert [step for step, _ in told.curve] == [1, 2, 3, 4, 5]
    assert (told.eval_loss, told.eval_curve) == (5.5, [(5, 5.5)])


async def test_a_long_curve_comes_in_parts(
    store: SqliteJobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "EVENTS_PER_READ", 4)
    sight = JobSight()
    await train(store, await bring_to(store, JobState.RUNNING), range(1, 11))
    parts = [len((await shown(sight, store)).curve) for _ in range(4)]
    assert parts == [4, 8, 10, 10]


async def test_a_job_that_failed_says_why_without_saying_where(store: SqliteJobs) -> None:
    job = await bring_to(store, JobState.RUNNING)
    job = await train(store, job, range(1, 3), loss=math.nan)
    error = {"reason": "TRAINER_FAILED", "message": "in /srv/state/jobs/1/run.py: <b>bad</b>"}
    await store.change_job(job, JobChange(state=JobState.FAILED, error=error))
    told = await shown(JobSight(), store)
    assert told.is_final and told.message == "in run.py: <b>bad</b>"
    assert (told.loss, told.eta_s, told.curve) == (None, None, [(1, 9.0)])


async def test_what_became_of_the_adapter_is_told_once_it_is_something(store: SqliteJobs) -> None:
    job = await bring_to(store, JobState.FINALIZING)
    assert (await shown(JobSight(), store)).publication == ""
    serving = {"state": "serving", "adapter": "sql", "version": 1}
    await store.change_job(job, JobChange(publication=serving))
    assert (await shown(JobSight(), store)).publication == "serving"


async def test_jobs_at_work_come_first_and_all_of_them_are_counted(store: SqliteJobs) -> None:
    for number in range(ENDED_SHOWN + 1):
        await bring_to(store, JobState.SUCCEEDED, new_job(f"ended-{number}"))
    for number in range(ACTIVE_SHOWN + 1):
        await bring_to(store, JobState.QUEUED, new_job(f"queued-{number:02}"))
    await bring_to(store, JobState.QUEUED, new_job("of-another", tenant="other"))
    jobs, active = await JobSight().read(Sights(store), TENANT)
    assert [job.name for job in jobs] == [
        *(f"queued-{number:02}" for number in range(ACTIVE_SHOWN, 0, -1)),
        *(f"ended-{number}" for number in range(ENDED_SHOWN, 0, -1)),
    ]
    assert active == ACTIVE_SHOWN + 1


async def test_a_job_that_waits_is_told_with_its_place_and_priority(store: SqliteJobs) -> None:
    first = await bring_to(store, JobState.QUEUED, new_job("first", priority=-2))
    second = await bring_to(store, JobState.QUEUED, new_job("second"))
    await bring_to(store, JobState.RUNNING, new_job("running", priority=4))
    jobs, _ = await JobSight().read(Sights(store, [second.uid, first.uid]), TENANT)
    assert [(job.name, job.queue_position, job.priority) for job in jobs] == [
        *(("running", 0, 4), ("second", 1, 0), ("first", 2, -2))
    ]


async def test_a_name_that_is_used_again_begins_a_curve_of_its_own(store: SqliteJobs) -> None:
    sight = JobSight()
    job = await train(store, await bring_to(store, JobState.RUNNING, new_job("x")), range(1, 4))
    assert len((await shown(sight, store)).curve) == 3
    await store.change_job(job, JobChange(state=JobState.FAILED))
    await store.delete_job(TENANT, "x")
    await bring_to(store, JobState.RUNNING, new_job("x"))
    assert (await shown(sight, store)).curve == []
