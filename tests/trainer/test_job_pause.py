"""Pausing in each state: what was computed is saved, the device is free, and the job goes on."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from store.job_records import Intent, JobRecord, JobState
from tests.trainer.job_stage import TENANT, Stage, stage
from tests.trainer.scripted_worker import Script
from trainer.errors import JobNotPausable, JobNotResumable
from trainer.recovery import recovery_of

RUNS_ON = Script(steps=60, step_s=0.02)
SLOW = Script(steps=10_000, step_s=0.02)


async def paused(s: Stage, name: str) -> JobRecord:
    job = await s.until(name, JobState.PAUSED)
    assert job.state is JobState.PAUSED, job.error
    return job


async def goes_on(s: Stage, name: str, *, attempt: int) -> JobRecord:
    """The job is resumed, and succeeds."""
    resumed = await s.jobs.resume(TENANT, name)
    assert (resumed.state, resumed.intent) == (JobState.QUEUED, Intent.RUN)
    job = await s.ended(name)
    assert (job.state, job.attempt) == (JobState.SUCCEEDED, attempt), job.error
    events = await s.events(name)
    assert [event.sequence for event in events] == list(range(1, len(events) + 1))
    assert len(s.publisher.published) == 1
    return job


async def test_a_running_job_saves_leaves_its_device_and_goes_on_where_it_was(
    tmp_path: Path,
) -> None:
    async with stage(tmp_path) as s:
        await s.create("one", RUNS_ON)
        await s.until_step("one", 3)
        asked = await s.jobs.pause(TENANT, "one")
        assert (asked.state, asked.intent) == (JobState.PAUSING, Intent.PAUSE)
        job = await paused(s, "one")
        assert not s.processes(job) and job.end_time_ns is None
        [saved] = await s.jobs.checkpoints(TENANT, "one")
        await s.create("two")
        assert (await s.ended("two")).state is JobState.SUCCEEDED, "the device is free"
        s.publisher.published.clear()
        job = await goes_on(s, "one", attempt=2)
        assert await s.steps("one") == list(range(1, 61)), "nothing is computed twice"
        told = recovery_of(job)
        assert told.resumed_from is not None and told.resumed_from.step == saved.step
        assert (told.spent, told.lost_steps) == (0, 0)
        assert (await s.states("one"))[3:7] == ["running", "pausing", "paused", "queued"]


async def test_pausing_and_resuming_again_change_nothing(tmp_path: Path) -> None:
    async with stage(tmp_path) as s:
        await s.create("one", SLOW)
        await s.until_step("one", 1)
        before = await s.job("one")
        after = await s.jobs.resume(TENANT, "one")  # it trains on meanwhile
        assert (after.state, after.intent, after.epoch) == (
            *(before.state, before.intent, before.epoch),
        )
        await s.jobs.pause(TENANT, "one")
        again = await s.jobs.pause(TENANT, "one")
        assert again.state in (JobState.PAUSING, JobState.PAUSED)
        job = await paused(s, "one")
        assert await s.jobs.pause(TENANT, "one") == job
        first = await s.jobs.resume(TENANT, "one")
        again = await s.jobs.resume(TENANT, "one")
        assert first.intent is again.intent is Intent.RUN
        assert (await s.states("one")).count("paused") == 1
        await s.jobs.cancel(TENANT, "one", discard=True)
        await s.ended("one")


@pytest.mark.parametrize("restarted", [False, True])
async def test_a_paused_job_rests_until_it_is_resumed(tmp_path: Path, restarted: bool) -> None:
    async with stage(tmp_path) as s:
        await s.create("one", RUNS_ON)
        await s.until_step("one", 2)
        await s.jobs.pause(TENANT, "one")
        await paused(s, "one")
        if restarted:
            await s.restart()
        await asyncio.sleep(0.3)
        assert (await s.job("one")).state is JobState.PAUSED
        await goes_on(s, "one", attempt=2)


async def test_a_pause_goes_on_after_a_restart(tmp_path: Path) -> None:
    async with stage(tmp_path, grace_s=5.0) as s:
        await s.create("one", RUNS_ON.model_copy(update={"save_s": 0.5}))
        await s.until_step("one", 2)
        await s.jobs.pause(TENANT, "one")
        await s.restart()
        job = await paused(s, "one")
        assert not s.processes(job)
        assert len(await s.jobs.checkpoints(TENANT, "one")) == 1
        await goes_on(s, "one", attempt=2)


async def test_a_wish_to_pause_is_kept_that_nobody_came_to_carry_out(tmp_path: Path) -> None:
    async with stage(tmp_path) as s:
        await s.create("one", RUNS_ON)
        await s.until_step("one", 1)
        await s.stop()
        await s.store.intend(TENANT, "one", Intent.PAUSE)
        await s.restart()
        await paused(s, "one")
        await s.stop()
        await s.store.intend(TENANT, "one", Intent.RUN)
        await s.restart()
        assert (await s.ended("one")).state is JobState.SUCCEEDED


@pytest.mark.parametrize("wish", ["pause", "cancel"])
async def test_one_that_is_killed_as_it_saves_leaves_nothing_half_written(
    tmp_path: Path, wish: str
) -> None:
    async with stage(tmp_path, grace_s=1.0) as s:
        await s.create("one", Script(steps=10_000, step_s=0.02, save_at=2, save_s=60.0))
        job = await s.until_step("one", 2)
        run = s.run_folder(job)
        run.rows.mkdir()
        async with asyncio.timeout(60):
            while not (run.checkpoints / "checkpoint-2").exists():
                await asyncio.sleep(0.02)
        if wish == "pause":
            await s.jobs.pause(TENANT, "one")
        else:
            await s.jobs.cancel(TENANT, "one", discard=False)
        job = await s.until("one", JobState.PAUSED)
        assert job.state is (JobState.PAUSED if wish == "pause" else JobState.CANCELLED)
        assert not run.rows.exists() and not list(run.checkpoints.iterdir())


async def test_a_waiting_job_is_paused_at_once_and_gives_up_its_place(tmp_path: Path) -> None:
    async with stage(tmp_path) as s:
        await s.create("a", Script(wait_for="go"))
        await s.until("a", JobState.RUNNING)
        for name in "bc":
            await s.create(name)
            await s.until(name, JobState.QUEUED)
        assert (await s.jobs.pause(TENANT, "b")).state is JobState.PAUSED
        async with asyncio.timeout(60):
            while s.jobs.queue_position(await s.job("c")) != 1:
                await asyncio.sleep(0.01)
        (tmp_path / "go").touch()
        assert (await s.ended("c")).state is JobState.SUCCEEDED
        assert (await s.job("b")).state is JobState.PAUSED
        await s.jobs.resume(TENANT, "b")
        job = await s.ended("b")
        assert (job.state, job.attempt) == (JobState.SUCCEEDED, 1)


async def test_a_job_whose_dataset_is_read_is_paused_before_it_takes_a_device(
    tmp_path: Path,
) -> None:
    async with stage(tmp_path) as s:
        s.preparations.gate.clear()
        await s.create("one")
        asked = await s.jobs.pause(TENANT, "one")
        assert (asked.state, asked.intent) == (JobState.VALIDATING, Intent.PAUSE)
        s.preparations.gate.set()
        assert (await paused(s, "one")).attempt == 0
        await goes_on(s, "one", attempt=1)


async def test_a_job_that_loads_is_paused_without_a_checkpoint(tmp_path: Path) -> None:
    async with stage(tmp_path, grace_s=60.0) as s:
        await s.create("one", Script(load_s=60.0))
        job = await s.until("one", JobState.PREPARING)
        async with asyncio.timeout(60):
            while not s.run_folder(job).alive.exists():
                await asyncio.sleep(0.02)
        (s.root / "scripts" / "one.json").unlink()
        began_s = time.monotonic()
        assert (await s.jobs.pause(TENANT, "one")).state is JobState.PAUSING
        await paused(s, "one")
        assert time.monotonic() - began_s < 10.0, "there is nothing to wait for"
        job = await goes_on(s, "one", attempt=2)
        assert recovery_of(job).spent == 0


async def test_a_process_that_does_not_listen_is_ended_and_nothing_counts(tmp_path: Path) -> None:
    script = SLOW.model_copy(update={"deaf": True, "save_each": True, "child": True})
    async with stage(tmp_path, grace_s=1.0) as s:
        await s.create("one", script)
        await s.until_step("one", 2)
        await s.jobs.pause(TENANT, "one")
        job = await paused(s, "one")
        assert not s.processes(job)
        assert recovery_of(job).spent == 0
        (s.root / "scripts" / "one.json").write_text(SLOW.model_dump_json())
        await s.jobs.resume(TENANT, "one")
        reached = job.progress["step"] if job.progress else 0
        job = await s.until_step("one", reached + 1)
        assert recovery_of(job).resumed_from is not None
        await s.jobs.cancel(TENANT, "one", discard=True)
        await s.ended("one")


async def test_a_job_that_was_done_before_it_heard_is_finished(tmp_path: Path) -> None:
    async with stage(tmp_path) as s:
        await s.create("one", Script(steps=2, deaf=True, save_s=0.4))
        await s.until_step("one", 2)
        await s.jobs.pause(TENANT, "one")
        job = await s.ended("one")
        assert job.state is JobState.SUCCEEDED
        assert (await s.states("one"))[4:] == ["pausing", "finalizing", "succeeded"]


async def test_a_job_resumed_while_it_is_pausing_is_queued_once_it_is_paused(
    tmp_path: Path,
) -> None:
    async with stage(tmp_path) as s:
        await s.create("one", RUNS_ON.model_copy(update={"save_s": 0.5}))
        await s.until_step("one", 2)
        await s.jobs.pause(TENANT, "one")
        resumed = await s.jobs.resume(TENANT, "one")
        assert (resumed.state, resumed.intent) == (JobState.PAUSING, Intent.RUN)
        job = await s.ended("one")
        assert (job.state, job.attempt) == (JobState.SUCCEEDED, 2)
        assert await s.steps("one") == list(range(1, 61))


async def test_a_paused_job_can_be_cancelled(tmp_path: Path) -> None:
    async with stage(tmp_path) as s:
        await s.create("one", SLOW)
        await s.until_step("one", 2)
        await s.jobs.pause(TENANT, "one")
        await paused(s, "one")
        await s.jobs.cancel(TENANT, "one", discard=False)
        assert (await s.ended("one")).state is JobState.CANCELLED
        assert len(await s.jobs.checkpoints(TENANT, "one")) == 1


async def test_what_cannot_be_paused_or_resumed_is_refused(tmp_path: Path) -> None:
    async with stage(tmp_path, grace_s=2.0) as s:
        s.publisher.gate.clear()
        await s.create("one")
        await s.until("one", JobState.FINALIZING)
        with pytest.raises(JobNotPausable, match="FINALIZING"):
            await s.jobs.pause(TENANT, "one")
        s.publisher.gate.set()
        before = await s.ended("one")
        with pytest.raises(JobNotPausable, match="SUCCEEDED"):
            await s.jobs.pause(TENANT, "one")
        with pytest.raises(JobNotResumable, match="create it again"):
            await s.jobs.resume(TENANT, "one")
        assert await s.job("one") == before

        await s.create("two", SLOW.model_copy(update={"deaf": True}))
        await s.until_step("two", 1)
        await s.jobs.cancel(TENANT, "two", discard=False)
        with pytest.raises(JobNotPausable, match="CANCELLING"):
            await s.jobs.pause(TENANT, "two")
        with pytest.raises(JobNotResumable, match="CANCELLING"):
            await s.jobs.resume(TENANT, "two")
        await s.ended("two")
