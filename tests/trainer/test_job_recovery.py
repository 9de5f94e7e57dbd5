"""A training process dies, and another goes on from the newest checkpoint that is whole."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest

from store.job_records import EventKind, JobRecord, JobState
from tests.trainer.job_stage import TENANT, Stage, stage
from tests.trainer.scripted_worker import Script
from trainer import recovery
from trainer.events import FailureReason
from trainer.recovery import recovery_of
from trainer.run_folder import RunPlan

DIES_ONCE = Script(steps=6, save_each=True, die_at=4, well_from=2)


def plan_of(s: Stage, job: JobRecord, attempt: int) -> RunPlan:
    return RunPlan.model_validate_json(s.run_folder(job, attempt).plan.read_bytes())


async def test_the_next_attempt_goes_on_from_the_newest_checkpoint(tmp_path: Path) -> None:
    async with stage(tmp_path) as s:
        await s.create("one", DIES_ONCE.model_copy(update={"child": True}))
        job = await s.ended("one")
        assert (job.state, job.attempt) == (JobState.SUCCEEDED, 2), job.error
        assert await s.states("one") == [
            *("validating", "queued", "preparing", "running", "recovering"),
            *("queued", "preparing", "running", "finalizing", "succeeded"),
        ]
        assert await s.steps("one") == [1, 2, 3, 4, 5, 6]
        assert plan_of(s, job, 1).resume == ""
        folder = s.run_folder(job, 1).checkpoints / "checkpoint-3"
        assert plan_of(s, job, 2).resume == str(folder)
        told = recovery_of(job)
        assert told.resumed_from is not None
        assert (told.resumed_from.step, told.spent, told.lost_steps) == (3, 1, 0)
        assert job.manifest is not None and job.manifest["checkpoint"]["attempt"] == 2
        (how,) = await s.lost("one")
        assert "killed by SIGKILL" in how
        assert len(s.publisher.published) == 1
        assert not s.processes(job), "what the lost attempt had started is gone"


async def test_steps_after_the_checkpoint_are_computed_again_and_counted(tmp_path: Path) -> None:
    async with stage(tmp_path) as s:
        await s.create("one", Script(steps=6, save_at=2, die_at=5, well_from=2))
        job = await s.ended("one")
        assert job.state is JobState.SUCCEEDED
        assert await s.steps("one") == [1, 2, 3, 4, 3, 4, 5, 6]
        assert recovery_of(job).lost_steps == 2
        events = await s.events("one")
        [notice] = [e.payload for e in events if e.kind is EventKind.NOTICE]
        assert notice["message"] == "attempt 2 goes on from step 2; 2 steps are computed again"


async def test_where_a_job_stands_goes_back_to_its_checkpoint(tmp_path: Path) -> None:
    async with stage(tmp_path) as s:
        script = Script(steps=6, save_at=2, die_at=5, well_from=2, load_s=0.5)
        await s.create("one", script)
        async with asyncio.timeout(60):
            while (job := await s.job("one")).attempt < 2:
                await asyncio.sleep(0.02)
        assert job.progress is not None
        assert (job.progress["step"], job.progress["tokens_seen"]) == (2, 200)
        await s.ended("one")


async def test_a_job_without_a_checkpoint_begins_again(tmp_path: Path) -> None:
    async with stage(tmp_path) as s:
        await s.create("one", Script(steps=3, die_at=3, well_from=2))
        job = await s.ended("one")
        assert job.state is JobState.SUCCEEDED
        assert await s.steps("one") == [1, 2, 1, 2, 3]
        told = recovery_of(job)
        assert (told.resumed_from, told.spent, told.lost_steps) == (None, 2, 2)


async def test_a_checkpoint_that_is_damaged_is_not_gone_on_from(tmp_path: Path) -> None:
    async with stage(tmp_path) as s:
        await s.create("one", Script(steps=6, save_each=True, die_at=4, well_from=2, load_s=0.3))
        job = await s.until_step("one", 3)
        damaged = s.run_folder(job).checkpoints / "checkpoint-3" / "adapter"
        async with asyncio.timeout(60):
            while not (damaged.parent / "manifest.json").exists():
                await asyncio.sleep(0.005)
        (damaged / "adapter_model.safetensors").write_bytes(b"other")
        job = await s.ended("one")
        assert job.state is JobState.SUCCEEDED
        resumed = recovery_of(job).resumed_from
        assert resumed is not None and resumed.step == 2


async def test_attempts_are_bounded_and_those_that_saved_nothing_count_double(
    tmp_path: Path,
) -> None:
    async with stage(tmp_path) as s:
        await s.create("saves", Script(steps=9, save_each=True, die_after=2), max_attempts=3)
        job = await s.ended("saves")
        assert job.state is JobState.FAILED and job.error is not None
        assert job.attempt == 3 and recovery_of(job).spent == 2
        assert await s.steps("saves") == [1, 2, 3, 4, 5, 6]
        assert job.error["reason"] == "TRAINER_LOST"
        assert "spec.max_attempts is 3" in job.error["message"]
        for number, step in [(1, 2), (2, 4), (3, 6)]:
            assert f"attempt {number} was killed by SIGKILL at step {step}" in job.error["message"]

        await s.create("fails", Script(steps=9, die_at=3), max_attempts=3)
        job = await s.ended("fails")
        assert job.state is JobState.FAILED and job.error is not None
        assert job.attempt == 2
        assert "at step 2, without a checkpoint" in job.error["message"]


async def test_one_attempt_means_that_the_first_loss_is_the_last(tmp_path: Path) -> None:
    async with stage(tmp_path) as s:
        await s.create("one", DIES_ONCE, max_attempts=1)
        job = await s.ended("one")
        assert (job.state, job.attempt) == (JobState.FAILED, 1)
        assert len(await s.jobs.checkpoints(TENANT, "one")) == 3, "they can be published"


@pytest.mark.parametrize("reason", [FailureReason.TRAINER_FAILED, FailureReason.LOSS_DIVERGED])
async def test_what_would_fail_again_is_not_tried_again(
    tmp_path: Path, reason: FailureReason
) -> None:
    async with stage(tmp_path) as s:
        await s.create("one", Script(save_each=True, fail=reason, well_from=2))
        job = await s.ended("one")
        assert (job.state, job.attempt) == (JobState.FAILED, 1)
        assert job.error is not None and job.error["reason"] == reason.value


async def test_a_failure_of_the_device_is_tried_again(tmp_path: Path) -> None:
    async with stage(tmp_path) as s:
        fail = FailureReason.TRAINER_FAILED
        await s.create("one", Script(fail=fail, fail_retryable=True, well_from=2))
        job = await s.ended("one")
        assert (job.state, job.attempt) == (JobState.SUCCEEDED, 2)


async def test_a_process_that_somebody_else_ended_is_followed_by_another(tmp_path: Path) -> None:
    async with stage(tmp_path) as s:
        await s.create("one", Script(steps=10_000, step_s=0.02, well_from=2))
        job = await s.until_step("one", 3)
        (s.root / "scripts" / "one.json").write_text(Script(steps=400).model_dump_json())
        os.kill(min(s.processes(job)), signal.SIGTERM)
        job = await s.ended("one")
        assert (job.state, job.attempt) == (JobState.SUCCEEDED, 2)
        (how,) = await s.lost("one")
        assert "asked to end, and not by the gateway" in how


async def test_a_recovering_job_leaves_its_device_to_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recovery, "BACKOFF_S", 1.5)
    async with stage(tmp_path) as s:
        await s.create("one", DIES_ONCE)
        await s.until("one", JobState.RECOVERING)
        await s.create("two")
        assert (await s.ended("two")).state is JobState.SUCCEEDED
        assert (await s.job("one")).state is JobState.RECOVERING
        assert (await s.ended("one")).state is JobState.SUCCEEDED


async def test_a_recovering_job_waits_on_after_a_restart_and_no_longer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recovery, "BACKOFF_S", 1.0)
    async with stage(tmp_path) as s:
        await s.create("one", DIES_ONCE)
        job = await s.until("one", JobState.RECOVERING)
        await s.restart()
        ended = await s.ended("one")
        assert ended.state is JobState.SUCCEEDED
        [_, queued] = [
            event.time_ns
            for event in await s.events("one")
            if event.kind is EventKind.STATE_CHANGED and event.payload["state"] == "queued"
        ]
        assert queued >= recovery_of(job).retry_time_ns


async def test_a_recovering_job_is_cancelled_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recovery, "BACKOFF_S", 60.0)
    async with stage(tmp_path) as s:
        await s.create("one", DIES_ONCE)
        await s.until("one", JobState.RECOVERING)
        await s.jobs.cancel(TENANT, "one", discard=False)
        assert (await s.ended("one")).state is JobState.CANCELLED
        assert len(await s.jobs.checkpoints(TENANT, "one")) == 3
