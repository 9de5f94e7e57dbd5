"""A training process that does not get on is ended, and another goes on in its place."""

from __future__ import annotations

import asyncio
import os
import re
import signal
from pathlib import Path

import pytest

from store.job_records import JobState
from tests.trainer.job_stage import stage
from tests.trainer.scripted_worker import Script
from trainer.recovery import recovery_of


@pytest.mark.parametrize("unkillable", [False, True], ids=["asked", "killed"])
async def test_a_process_that_hangs_is_ended_and_followed_by_another(
    tmp_path: Path, unkillable: bool
) -> None:
    script = Script(steps=5, save_each=True, hang_at=4, well_from=2, unkillable=unkillable)
    async with stage(tmp_path, stall_timeout_s=6.0) as s:  # a start is that slow on a busy machine
        await s.create("one", script.model_copy(update={"child": True}))
        job = await s.ended("one")
        assert (job.state, job.attempt) == (JobState.SUCCEEDED, 2), job.error
        (how,) = await s.lost("one")
        assert "the training process did not get on for 6 s, and was ended" in how
        assert await s.steps("one") == [1, 2, 3, 4, 5]
        assert not s.processes(job)


async def test_a_stopped_process_is_killed(tmp_path: Path) -> None:
    async with stage(tmp_path, stall_timeout_s=3.0) as s:
        await s.create("one", Script(steps=60, step_s=0.05, save_each=True, well_from=2))
        job = await s.until_step("one", 3)
        os.kill(min(s.processes(job)), signal.SIGSTOP)
        job = await s.ended("one")
        assert (job.state, job.attempt) == (JobState.SUCCEEDED, 2), job.error
        told = recovery_of(job)
        assert told.resumed_from is not None and told.lost_steps <= 1


async def test_a_process_that_hangs_each_time_fails_the_job(tmp_path: Path) -> None:
    async with stage(tmp_path, stall_timeout_s=0.5) as s:
        await s.create("one", Script(steps=5, hang_at=2))
        job = await s.ended("one")
        assert job.state is JobState.FAILED and job.error is not None
        assert job.error["reason"] == "TRAINER_LOST"
        # On a busy machine the second may be ended before it has loaded.
        assert re.search("attempt 2 did not get on for|while it loaded", job.error["message"])


async def test_a_process_that_waits_for_something_is_not_ended_before_its_time(
    tmp_path: Path,
) -> None:
    async with stage(tmp_path, stall_timeout_s=20.0) as s:
        await s.create("one", Script(steps=2, wait_for="go"))
        await s.until_step("one", 2)
        await asyncio.sleep(1.5)
        (tmp_path / "go").touch()
        job = await s.ended("one")
        assert (job.state, job.attempt) == (JobState.SUCCEEDED, 1)
