"""Jobs from creation to their end, with the real store and scripted training processes."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

import pytest

from store.job_records import (
    DatasetUnknown,
    EventKind,
    JobActive,
    JobState,
    JobUnknown,
    QueueFull,
)
from store.records import RequestIdReused
from tests.trainer.job_stage import SOON_S, TENANT, stage
from tests.trainer.scripted_worker import Script
from trainer.devices import Device
from trainer.errors import CheckpointUnknown, GateRejected
from trainer.events import FailureReason, PublicationState
from trainer.run_folder import RunPlan

WHOLE_WAY = ["validating", "queued", "preparing", "running", "finalizing", "succeeded"]


async def test_a_job_trains_and_publishes_and_tells_all_of_it(tmp_path: Path) -> None:
    async with stage(tmp_path) as s:
        created = await s.create("one", Script(steps=3, save_each=True))
        assert created.state is JobState.VALIDATING
        assert created.publication["state"] == "pending"
        job = await s.ended("one")
        events = await s.events("one")
        processes = s.processes(job)
        assert await s.states("one") == WHOLE_WAY

    assert [event.sequence for event in events] == list(range(1, len(events) + 1))
    kinds = [event.kind for event in events]
    assert kinds.count(EventKind.PROGRESS) == 3
    assert kinds.count(EventKind.CHECKPOINT) == 3
    published = [e.payload["state"] for e in events if e.kind is EventKind.PUBLICATION]
    assert published == ["gating", "serving"]
    assert kinds[-1] is EventKind.STATE_CHANGED, "nothing comes after the end"
    assert job.publication["traffic_percent"] == 10
    assert job.progress is not None and job.progress["step"] == 3
    assert job.manifest is not None and len(job.manifest["sha256"]) == 64
    assert job.attempt == 1 and not processes
    assert s.publisher.published[0][1] == s.run_folder(job).checkpoints / "checkpoint-3"


async def test_a_job_that_ended_with_an_evaluation_has_its_last_loss_too(tmp_path: Path) -> None:
    async with stage(tmp_path) as s:
        await s.create("one", Script(steps=2, evaluate=True))
        job = await s.ended("one")
    assert job.progress is not None
    assert (job.progress["loss"], job.progress["eval_loss"]) == (0.5, 0.75)


async def test_the_plan_says_all_that_a_process_has_to_know(tmp_path: Path) -> None:
    async with stage(tmp_path) as s:
        await s.create("one")
        job = await s.ended("one")
        plan = RunPlan.model_validate_json(s.run_folder(job).plan.read_bytes())
        dataset = await s.store.dataset(TENANT, "data")
    assert (plan.job, plan.uid, plan.attempt, plan.device) == ("one", job.uid, 1, "cpu")
    assert plan.dataset_sha256 == dataset.sha256
    assert plan.rows == str(tmp_path / "prepared") and plan.eval_rows == ""
    assert plan.spec.lora.r == 32 and plan.spec.hyperparameters.learning_rate == 2e-4


async def test_a_job_that_does_not_publish_says_so(tmp_path: Path) -> None:
    async with stage(tmp_path) as s:
        await s.create("one", publish=False)
        job = await s.ended("one")
        assert job.state is JobState.SUCCEEDED
        assert job.publication["state"] == "not_requested"
        assert not s.publisher.published


@pytest.mark.parametrize("state", [PublicationState.REJECTED, PublicationState.FAILED])
async def test_a_job_has_succeeded_whatever_became_of_its_publication(
    tmp_path: Path, state: PublicationState
) -> None:
    async with stage(tmp_path) as s:
        s.publisher.state = state
        await s.create("one")
        job = await s.ended("one")
    assert job.state is JobState.SUCCEEDED
    assert job.publication["state"] == state.value
    assert job.publication["reasons"] == ["it is what the script says"]


async def test_a_publisher_that_breaks_fails_the_publication_alone(tmp_path: Path) -> None:
    async with stage(tmp_path) as s:
        s.publisher.error = RuntimeError("secret")
        await s.create("one")
        job = await s.ended("one")
        assert job.state is JobState.SUCCEEDED
        assert job.publication["state"] == "failed"
        assert "PublishCheckpoint" in job.publication["reasons"][0]
        assert "secret" not in job.publication["reasons"][0]

        s.publisher.error = None
        again = await s.jobs.publish_checkpoint(TENANT, "one")
        assert again.state is PublicationState.SERVING
        assert (await s.job("one")).publication["state"] == "serving"


async def test_a_bad_dataset_fails_the_job_with_what_is_wrong(tmp_path: Path) -> None:
    async with stage(tmp_path) as s:
        await s.add_dataset("bad", "{}\nrubbish\n")
        spec = s.spec().model_copy(update={"dataset": "bad"})
        await s.jobs.create(TENANT, spec, name="one")
        job = await s.ended("one")
        states = await s.states("one")
    assert states == ["validating", "failed"]
    assert job.error is not None and job.error["reason"] == "DATASET_INVALID"
    assert job.error["metadata"] == {"dataset": "bad", "total_lines": "2", "bad_lines": "1"}
    assert "1 of 2 lines are bad: correct them" in job.error["message"]
    assert job.attempt == 0


@pytest.mark.parametrize(
    ("script", "said"),
    [
        (Script(die_at=2), "killed by SIGKILL, as the kernel does when the host's memory runs out"),
        (Script(die_at=0, die_signal=signal.SIGSEGV), "killed by SIGSEGV"),
        (Script(exit_at=1), "exit code 7"),
        (Script(damage=True), "damaged"),
    ],
    ids=["killed", "crashed while loading", "ended without a word", "damaged"],
)
async def test_a_process_that_proves_no_success_is_lost(
    tmp_path: Path, script: Script, said: str
) -> None:
    async with stage(tmp_path) as s:
        await s.create("one", script.model_copy(update={"say": "my last words", "child": True}))
        job = await s.ended("one")
        left = s.processes(job)
    assert job.state is JobState.FAILED
    assert job.error is not None and job.error["reason"] == "TRAINER_LOST"
    assert said in job.error["message"]
    assert "my last words" in job.error["message"]
    assert job.error["metadata"] == {"attempt": "2"}
    assert not left, "what it had started is gone"
    assert not s.publisher.published


async def test_a_process_that_says_why_it_failed_is_believed(tmp_path: Path) -> None:
    async with stage(tmp_path) as s:
        await s.create("one", Script(fail=FailureReason.LOSS_DIVERGED))
        job = await s.ended("one")
    assert job.error is not None and job.error["reason"] == "LOSS_DIVERGED"
    assert job.error["message"] == "it is what the script says"


async def test_rubbish_and_torn_lines_and_nan_do_not_stop_a_run(tmp_path: Path) -> None:
    async with stage(tmp_path) as s:
        await s.create("one", Script(rubbish='{"half": \x00', torn=True, nan=True))
        job = await s.ended("one")
        events = await s.events("one")
    assert job.state is JobState.SUCCEEDED
    assert [notice["code"] for notice in job.notices] == ["EVENT_UNREADABLE"]
    progress = [event.payload for event in events if event.kind is EventKind.PROGRESS]
    assert [p["step"] for p in progress] == [1, 2, 3]
    assert progress[0]["loss"] is None


async def test_one_job_runs_on_a_device_and_the_oldest_is_next(tmp_path: Path) -> None:
    async with stage(tmp_path) as s:
        await s.create("a", Script(wait_for="go"))
        await s.until("a", JobState.RUNNING)
        for name in ("b", "c"):
            await s.create(name)
            await s.until(name, JobState.QUEUED)
        assert s.jobs.queue_position(await s.job("a")) == 0
        assert s.jobs.queue_position(await s.job("b")) == 1
        assert s.jobs.queue_position(await s.job("c")) == 2
        await asyncio.sleep(0.3)
        assert (await s.job("b")).state is JobState.QUEUED
        (tmp_path / "go").touch()
        jobs = [await s.ended(name) for name in "abc"]
    assert all(job.state is JobState.SUCCEEDED for job in jobs)
    starts = [job.start_time_ns or 0 for job in jobs]
    ends = [job.end_time_ns or 0 for job in jobs]
    assert starts == sorted(starts)
    assert starts[1] > starts[0] and ends[0] < ends[1] < ends[2]


async def test_two_devices_run_two_jobs(tmp_path: Path) -> None:
    async with stage(tmp_path, devices=[Device("cpu"), Device("cpu")]) as s:
        for name in "ab":
            await s.create(name, Script(wait_for="go"))
        for name in "ab":
            assert (await s.until(name, JobState.RUNNING)).state is JobState.RUNNING
        (tmp_path / "go").touch()
        await asyncio.gather(s.ended("a"), s.ended("b"))


async def test_the_same_request_makes_one_job(tmp_path: Path) -> None:
    async with stage(tmp_path) as s:
        first = await s.jobs.create(TENANT, s.spec(), request_id="r")
        second = await s.jobs.create(TENANT, s.spec(), request_id="r")
        assert first.uid == second.uid
        await s.ended(first.name)
        third = await s.jobs.create(TENANT, s.spec(), request_id="r")
        assert third.state is JobState.SUCCEEDED
        assert len(s.publisher.published) == 1


async def test_a_request_is_answered_when_what_it_named_is_gone(tmp_path: Path) -> None:
    async with stage(tmp_path) as s:
        first = await s.jobs.create(TENANT, s.spec(), request_id="r")
        await s.ended(first.name)
        await s.store.remove_dataset(TENANT, "data")
        again = await s.jobs.create(TENANT, s.spec(), request_id="r")
        assert again.uid == first.uid
        with pytest.raises(RequestIdReused):
            await s.jobs.create(TENANT, s.spec(), labels={"of": "other"}, request_id="r")
        with pytest.raises(DatasetUnknown):
            await s.jobs.create(TENANT, s.spec(), request_id="new")


async def test_a_process_whose_last_word_is_of_a_full_disk_lacked_space(tmp_path: Path) -> None:
    async with stage(tmp_path) as s:
        say = "OSError: [Errno 28] No space left on device"
        await s.create("one", Script(exit_at=1, say=say))
        job = await s.ended("one")
    assert job.error is not None and job.error["reason"] == "STORAGE_FULL"
    assert "free some space" in job.error["message"]
    assert job.error["metadata"] == {"attempt": "1"}


async def test_no_more_jobs_wait_than_may(tmp_path: Path) -> None:
    async with stage(tmp_path, max_active=1) as s:
        await s.create("one", Script(wait_for="go"))
        with pytest.raises(QueueFull):
            await s.create("two")
        (tmp_path / "go").touch()
        await s.ended("one")


async def test_a_job_is_deleted_with_its_files_once_it_has_ended(tmp_path: Path) -> None:
    async with stage(tmp_path) as s:
        created = await s.create("one", Script(wait_for="go"))
        await s.until("one", JobState.RUNNING)
        with pytest.raises(JobActive):
            await s.jobs.delete(TENANT, "one")
        (tmp_path / "go").touch()
        await s.ended("one")
        await s.jobs.delete(TENANT, "one")
        with pytest.raises(JobUnknown):
            await s.job("one")
        assert not (tmp_path / "jobs" / created.uid).exists()


async def test_pitfalls_checkpoints_are_listed_as_far_as_they_are_whole(tmp_path: Path) -> None:
    async with stage(tmp_path) as s:
        await s.create("one", Script(steps=4, save_each=True))
        job = await s.ended("one")
        saved = await s.jobs.checkpoints(TENANT, "one")
        assert [checkpoint.step for checkpoint in saved] == [4, 3, 2, 1]
        assert [checkpoint.final for checkpoint in saved] == [True, False, False, False]
        folder = s.run_folder(job).checkpoints
        (folder / "checkpoint-2" / "manifest.json").unlink()
        (folder / "checkpoint-3" / "manifest.json").write_text("{}")
        saved = await s.jobs.checkpoints(TENANT, "one")
        assert [checkpoint.step for checkpoint in saved] == [4, 1]


async def test_a_checkpoint_is_published_by_its_step(tmp_path: Path) -> None:
    async with stage(tmp_path) as s:
        await s.create("one", Script(steps=2, save_each=True), publish=False)
        await s.ended("one")
        with pytest.raises(CheckpointUnknown):
            await s.jobs.publish_checkpoint(TENANT, "one", step=9)
        publication = await s.jobs.publish_checkpoint(TENANT, "one", step=1, adapter="other")
        assert publication.adapter == "other"
        assert (await s.job("one")).publication["state"] == "not_requested"
        await s.jobs.publish_checkpoint(TENANT, "one")
        steps = [path.name for _, path, _, _ in s.publisher.published]
        assert steps == ["checkpoint-1", "checkpoint-2"]
        s.publisher.state = PublicationState.REJECTED
        with pytest.raises(GateRejected):
            await s.jobs.publish_checkpoint(TENANT, "one")
        assert (await s.job("one")).publication["state"] == "serving", "what serves, serves"


async def test_jobs_wait_until_the_owner_runs_them(tmp_path: Path) -> None:
    async with stage(tmp_path) as s:
        await s.stop()
        created = await s.create("one")
        await asyncio.sleep(0.2)
        assert (await s.job("one")).state is JobState.VALIDATING
        await s.restart()
        job = await asyncio.wait_for(s.ended("one"), SOON_S)
        assert job.uid == created.uid and job.state is JobState.SUCCEEDED


async def test_a_process_that_has_said_its_last_is_not_waited_for(tmp_path: Path) -> None:
    async with stage(tmp_path) as s:
        await s.create("one", Script(linger_s=60.0))
        job = await s.ended("one")
        assert job.state is JobState.SUCCEEDED
        assert not s.processes(job)
