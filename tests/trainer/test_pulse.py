"""How many jobs there are, and for how long a process has been silent."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from store.job_records import JobChange, JobRecord, JobState
from store.jobs import JobStore
from store.sqlite_jobs import SqliteJobs
from tests.store.job_steps import bring_to, new_job
from trainer.job_folder import JobFolder
from trainer.pulse import take_pulse


async def running(store: JobStore, name: str) -> JobRecord:
    """A job with its first attempt."""
    queued = await bring_to(store, JobState.QUEUED, new_job(name))
    change = JobChange(state=JobState.PREPARING, attempt=1, device="cpu")
    return await store.change_job(queued, change)


def last_seen(folder: Path, job: JobRecord, ago_s: float) -> None:
    run = JobFolder(folder / job.uid).run(1)
    run.path.mkdir(parents=True)
    run.alive.touch()
    then_s = time.time() - ago_s
    os.utime(run.alive, (then_s, then_s))


async def test_the_longest_silence_of_a_process_that_should_run_is_told(tmp_path: Path) -> None:
    async with SqliteJobs(tmp_path / "jobs.sqlite") as store:
        pulse = await take_pulse(store, tmp_path)
        assert pulse.silent_s == 0.0
        assert set(pulse.jobs) == set(JobState) and not any(pulse.jobs.values())

        await running(store, "just-started")  # it has not shown itself yet
        assert (await take_pulse(store, tmp_path)).silent_s == 0.0
        last_seen(tmp_path, await running(store, "well"), 2.0)
        last_seen(tmp_path, await running(store, "hangs"), 500.0)
        last_seen(tmp_path, await running(store, "well-too"), 3.0)
        published = await running(store, "published")
        last_seen(tmp_path, published, 5000.0)
        for state in (JobState.RUNNING, JobState.FINALIZING):
            published = await store.change_job(published, JobChange(state=state))
        ended = await running(store, "ended")
        last_seen(tmp_path, ended, 5000.0)
        await store.change_job(ended, JobChange(state=JobState.FAILED))

        pulse = await take_pulse(store, tmp_path)
        assert pulse.silent_s == pytest.approx(500.0, abs=60.0)
        assert pulse.jobs[JobState.PREPARING] == 4
        assert pulse.jobs[JobState.FAILED] == 1
