"""What goes wrong around a job: with the store, with its name, with another job's row."""

from __future__ import annotations

import asyncio
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from store.job_records import JobChange, JobRecord, JobState, JobUnknown
from store.upload_folder import DatabaseFull, StorageFull
from tests.trainer.job_stage import TENANT, stage
from tests.trainer.scripted_worker import Script
from trainer import attempt as attempt_module
from trainer import job_run, jobs
from trainer.attempt import Attempt
from trainer.job_run import JobRun
from trainer.life import EXIT_STORAGE_FULL

TROUBLE = [sqlite3.OperationalError("disk I/O error"), StorageFull("the disk is full")]


async def test_a_job_that_was_deleted_is_driven_no_more(tmp_path: Path) -> None:
    async with stage(tmp_path) as s:
        created = await s.create("one")
        await s.ended("one")
        await s.stop()
        await s.store.delete_job(TENANT, "one")
        await asyncio.wait_for(JobRun(created, s.jobs._means).run(), 5)

        other = await s.create("one")  # nobody drives it
        await asyncio.wait_for(JobRun(created, s.jobs._means).run(), 5)
        assert await s.job("one") == other, "it is another job"


@pytest.mark.parametrize("error", TROUBLE, ids=["broken", "full"])
async def test_a_process_that_trains_is_not_ended_for_trouble_with_our_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setattr(job_run, "RETRY_S", 0.01)
    monkeypatch.setattr(job_run, "MAX_RETRY_S", 0.01)
    async with stage(tmp_path) as s:
        await s.create("one", Script(steps=60, step_s=0.05, wait_for="go"))
        job = await s.until_step("one", 2)
        failed = 0

        async def change_job(*_: Any) -> JobRecord:
            nonlocal failed
            failed += 1
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(s.store, "change_job", change_job)
            async with asyncio.timeout(20):
                while failed < 2 * job_run.TRIES:
                    await asyncio.sleep(0.02)
            assert len(s.processes(job)) == 1
        (tmp_path / "go").touch()
        job = await s.ended("one")
        assert job.state is JobState.SUCCEEDED, job.error
        assert job.progress is not None and job.progress["step"] == 60


@pytest.mark.parametrize("state", [JobState.QUEUED, JobState.FINALIZING])
async def test_a_database_without_room_fails_no_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: JobState
) -> None:
    monkeypatch.setattr(job_run, "MAX_RETRY_S", 0.01)
    async with stage(tmp_path) as s:
        if state is JobState.FINALIZING:
            s.publisher.gate.clear()
        else:
            await s.create("before", Script(wait_for="go"))
            await s.until("before", JobState.RUNNING)
        await s.create("one")
        await s.until("one", state)
        change_job, failed = s.store.change_job, 0

        async def no_room(seen: JobRecord, change: JobChange) -> JobRecord:
            nonlocal failed
            if seen.name == "one" and failed < 2 * job_run.TRIES:
                failed += 1
                # It has room for a little: for the job's end, as it were.
                if change.state is not JobState.FAILED:
                    raise DatabaseFull("the disk is full")
            return await change_job(seen, change)

        monkeypatch.setattr(s.store, "change_job", no_room)
        (tmp_path / "go").touch()
        s.publisher.gate.set()
        job = await s.ended("one")
        assert failed == 2 * job_run.TRIES
        assert job.state is JobState.SUCCEEDED, job.error


async def test_how_a_process_ended_is_known_once_the_database_has_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_run, "MAX_RETRY_S", 0.01)
    async with stage(tmp_path) as s:
        change_job, failed = s.store.change_job, 0

        async def no_room(seen: JobRecord, change: JobChange) -> JobRecord:
            nonlocal failed
            if change.state in (JobState.FAILED, JobState.RECOVERING) and failed < 3:
                failed += 1
                raise DatabaseFull("the disk is full")
            return await change_job(seen, change)

        monkeypatch.setattr(s.store, "change_job", no_room)
        await s.create("one", Script(exit_at=2, exit_code=EXIT_STORAGE_FULL))
        job = await s.ended("one")
        assert failed == 3 and job.attempt == 1
        assert job.error is not None and job.error["reason"] == "STORAGE_FULL"


async def test_a_job_that_fails_again_and_again_without_a_process_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_run, "MAX_RETRY_S", 0.01)
    async with stage(tmp_path) as s:

        async def prepare(*_: Any) -> None:
            raise RuntimeError("secret")

        monkeypatch.setattr(s.preparations, "prepare", prepare)
        await s.create("one")
        job = await s.ended("one")
        assert job.error is not None and job.error["reason"] == "TRAINER_FAILED"
        assert "secret" not in job.error["message"]


async def test_a_watcher_is_never_told_of_another_job_of_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with stage(tmp_path) as s:
        await s.create("one")
        await s.ended("one")
        read = s.store.job_events

        async def job_events(*arguments: Any, **options: Any) -> Any:
            monkeypatch.setattr(s.store, "job_events", read)
            await s.jobs.delete(TENANT, "one")
            await s.create("one")
            return await read(*arguments, **options)

        monkeypatch.setattr(s.store, "job_events", job_events)
        watcher = s.jobs.watch(TENANT, "one", after=0, heartbeat_s=60.0)
        with pytest.raises(JobUnknown):
            await asyncio.wait_for(anext(watcher), 5)
        await s.ended("one")


async def test_a_job_that_cannot_be_read_holds_up_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "RETRY_S", 0.05)
    async with stage(tmp_path) as s:
        await s.stop()
        bad, _ = await s.create("bad"), await s.create("good")

        async def write(intent: str) -> None:
            await s.store._write(
                lambda db: db.execute("UPDATE job SET intent = ? WHERE name = 'bad'", (intent,))
            )

        await write("rubbish")
        await s.restart()
        assert (await s.ended("good")).state is JobState.SUCCEEDED
        await s.create("new")
        assert (await s.ended("new")).state is JobState.SUCCEEDED
        await write(bad.intent.value)
        assert (await s.ended("bad")).state is JobState.SUCCEEDED


async def test_a_store_that_fails_at_the_start_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "RETRY_S", 0.05)
    async with stage(tmp_path) as s:
        await s.stop()
        await s.create("one")
        read, failures = s.store.active_jobs, [*TROUBLE, *TROUBLE]

        async def active_jobs() -> Any:
            if failures:
                raise failures.pop()
            return await read()

        monkeypatch.setattr(s.store, "active_jobs", active_jobs)
        await s.restart()
        assert (await s.ended("one")).state is JobState.SUCCEEDED


async def test_a_job_that_waits_for_a_device_that_was_taken_away_fails(tmp_path: Path) -> None:
    async with stage(tmp_path) as s:
        await s.create("one", Script(wait_for="go"))
        await s.until("one", JobState.RUNNING)
        await s.create("two")
        await s.until("two", JobState.QUEUED)
        s.devices = ()
        await s.restart()
        job = await s.ended("two")
        assert job.error is not None and job.error["reason"] == "TRAINING_UNAVAILABLE"
        assert "--training-devices" in job.error["message"]
        (tmp_path / "go").touch()
        assert (await s.ended("one")).state is JobState.SUCCEEDED, "it has its device"


async def test_a_cancel_while_the_gateway_starts_is_carried_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with stage(tmp_path) as s:
        await s.create("one", Script(steps=1, wait_for="never"))
        job = await s.until_step("one", 1)
        await s.stop()
        find = JobRun.find

        async def recover_late(run: JobRun) -> None:
            await find(run)
            await s.jobs.cancel(TENANT, "one", discard=False)

        monkeypatch.setattr(JobRun, "find", recover_late)
        s.grace_s = 0.0
        await s.restart()
        async with asyncio.timeout(15):
            assert (await s.ended("one")).state is JobState.CANCELLED
        assert not s.processes(job)


async def test_a_cancel_between_two_tries_is_carried_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with stage(tmp_path, grace_s=0.0) as s:
        await s.create("one", Script(steps=1, wait_for="never"))
        await s.until_step("one", 1)
        await s.stop()
        follow, failed = Attempt.follow, asyncio.Event()

        async def fail_once(attempt: Attempt, *arguments: Any, **options: Any) -> JobRecord:
            if not failed.is_set():
                failed.set()
                raise RuntimeError("once")
            return await follow(attempt, *arguments, **options)

        monkeypatch.setattr(Attempt, "follow", fail_once)
        await s.restart()
        await asyncio.wait_for(failed.wait(), 10)
        await asyncio.sleep(0.3)  # it waits for its next try now
        await s.jobs.cancel(TENANT, "one", discard=False)
        async with asyncio.timeout(15):
            assert (await s.ended("one")).state is JobState.CANCELLED


async def test_a_process_that_cannot_be_ended_is_given_up_some_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with stage(tmp_path) as s:
        await s.create("one")
        job = await s.ended("one")
        tries: list[object] = []

        def kill_all(run: object) -> bool:
            tries.append(run)
            return False

        monkeypatch.setattr(attempt_module, "kill_all", kill_all)
        attempt = Attempt(s.run_folder(job), s.jobs._journal)
        await asyncio.wait_for(attempt.end(), 5)
        assert len(tries) == attempt_module.END_TRIES
