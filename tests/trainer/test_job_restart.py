"""The gateway ends, in whatever state a job is, and its next start goes on."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from store.job_records import EventKind, Intent, JobState
from tests.trainer.job_stage import TENANT, Stage, stage
from tests.trainer.scripted_worker import Script
from trainer.devices import Device
from trainer.recovery import recovery_of
from trainer.run_folder import RunExit, write_whole

RUNS_ON = Script(steps=20, step_s=0.05, wait_for="go")
ROOT = Path(__file__).parents[2]


async def whole(s: Stage, name: str, steps: int) -> None:
    """The job succeeded in one attempt, and its events have no gap and nothing twice."""
    job = await s.ended(name)
    assert job.state is JobState.SUCCEEDED, job.error
    events = await s.events(name)
    assert [event.sequence for event in events] == list(range(1, len(events) + 1))
    told = [e.payload["step"] for e in events if e.kind is EventKind.PROGRESS]
    assert told == list(range(1, steps + 1))
    assert job.attempt == 1


async def test_a_running_job_goes_on_without_us_and_is_found_again(tmp_path: Path) -> None:
    async with stage(tmp_path) as s:
        await s.create("one", RUNS_ON)
        job = await s.until_step("one", 3)
        processes = s.processes(job)
        await s.restart(while_away=0.3)
        assert s.processes(job) == processes
        await s.create("two", Script())
        await s.until("two", JobState.QUEUED)
        await asyncio.sleep(0.3)
        assert (await s.job("two")).state is JobState.QUEUED, "the device is held"
        (tmp_path / "go").touch()
        await whole(s, "one", 20)
        assert (await s.ended("two")).state is JobState.SUCCEEDED


async def test_a_job_that_ended_while_we_were_away_is_finished(tmp_path: Path) -> None:
    async with stage(tmp_path) as s:
        await s.create("one", RUNS_ON)
        job = await s.until_step("one", 3)
        await s.stop()
        (tmp_path / "go").touch()
        while s.processes(job):
            await asyncio.sleep(0.05)
        assert (await s.job("one")).state is JobState.RUNNING
        await s.restart()
        await whole(s, "one", 20)


@pytest.mark.parametrize("said", [None, RunExit(ok=True)], ids=["nothing", "success"])
async def test_a_process_that_died_while_we_were_away_is_followed_by_another(
    tmp_path: Path, said: RunExit | None
) -> None:
    async with stage(tmp_path) as s:
        await s.create("one", RUNS_ON.model_copy(update={"save_each": True}))
        job = await s.until_step("one", 3)
        await s.stop()
        for pid in s.processes(job):
            os.kill(pid, signal.SIGKILL)
        if said is not None:  # which is no proof: there is no adapter
            write_whole(s.run_folder(job).exit, said)
        (tmp_path / "go").touch()
        await s.restart()
        job = await s.ended("one")
        assert job.state is JobState.SUCCEEDED, job.error
        assert job.attempt == 2
        assert recovery_of(job).resumed_from is not None
        (how,) = await s.lost("one")
        assert ("died while the gateway was away" if said is None else "damaged") in how


@pytest.mark.parametrize("state", [JobState.VALIDATING, JobState.QUEUED, JobState.FINALIZING])
async def test_a_job_without_a_process_goes_on_where_it_was(
    tmp_path: Path, state: JobState
) -> None:
    async with stage(tmp_path) as s:
        if state is JobState.VALIDATING:
            s.preparations.gate.clear()
        if state is JobState.FINALIZING:
            s.publisher.gate.clear()
        if state is JobState.QUEUED:
            await s.create("before", Script(wait_for="go"))
            await s.until("before", JobState.RUNNING)
        await s.create("one", Script(steps=2))
        assert (await s.until("one", state)).state is state
        await asyncio.sleep(0.1)
        await s.restart()
        s.preparations.gate.set()
        s.publisher.gate.set()
        (tmp_path / "go").touch()
        await whole(s, "one", 2)
        assert len(s.publisher.published) >= 1


async def test_a_job_that_was_to_be_started_is_started(tmp_path: Path) -> None:
    async with stage(tmp_path) as s:
        await s.create("one", Script(steps=2, load_s=30.0))
        job = await s.until("one", JobState.PREPARING)
        async with asyncio.timeout(10):
            while not s.processes(job):
                await asyncio.sleep(0.02)
        await s.stop()
        for pid in s.processes(job):  # as if the crash had come before the start
            os.kill(pid, signal.SIGKILL)
        s.run_folder(job).lock.unlink()
        (tmp_path / "scripts" / "one.json").unlink()
        await s.restart()
        await whole(s, "one", 3)


@pytest.mark.parametrize("plan", ["{}", '{"device": "7"}', "rubbish"])
async def test_a_plan_that_cannot_be_read_frees_no_device_and_stops_no_other_job(
    tmp_path: Path, plan: str
) -> None:
    async with stage(tmp_path) as s:
        await s.create("one", RUNS_ON)
        job = await s.until_step("one", 1)
        await s.create("two")
        await s.until("two", JobState.QUEUED)
        await s.stop()
        s.run_folder(job).plan.write_text(plan)
        await s.restart()
        await s.until_step("one", 20)
        await asyncio.sleep(0.3)
        assert (await s.job("two")).state is JobState.QUEUED, "one trains on the device"
        (tmp_path / "go").touch()
        await whole(s, "one", 20)
        assert (await s.ended("two")).state is JobState.SUCCEEDED


async def test_the_store_knows_the_device_that_a_job_was_given_at_last(tmp_path: Path) -> None:
    async with stage(tmp_path) as s:
        await s.create("one", Script(steps=2, load_s=30.0))
        job = await s.until("one", JobState.PREPARING)
        assert job.device == "cpu"
        async with asyncio.timeout(10):
            while not s.processes(job):
                await asyncio.sleep(0.02)
        await s.stop()
        for pid in s.processes(job):  # as if the crash had come before the start
            os.kill(pid, signal.SIGKILL)
        s.run_folder(job).lock.unlink()
        (tmp_path / "scripts" / "one.json").write_text(RUNS_ON.model_dump_json())
        smi = tmp_path / "nvidia-smi"
        smi.write_text("#!/bin/sh\necho 81559, 70000, 9.0\n")
        smi.chmod(0o700)
        s.devices = (Device("3"),)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PATH", f"{tmp_path}:{os.defpath}")
            await s.restart()
            job = await s.until_step("one", 1)
        assert job.device == "3"
        (tmp_path / "go").touch()
        assert (await s.ended("one")).state is JobState.SUCCEEDED


async def test_a_cancel_goes_on_after_a_restart(tmp_path: Path) -> None:
    async with stage(tmp_path, grace_s=2.0) as s:
        await s.create("one", Script(steps=10_000, step_s=0.05, deaf=True, child=True))
        job = await s.until_step("one", 1)
        await s.jobs.cancel(TENANT, "one", discard=False)
        await s.restart()
        job = await s.ended("one")
        assert job.state is JobState.CANCELLED
        assert not s.processes(job)


async def test_a_wish_to_cancel_is_kept_that_nobody_came_to_carry_out(tmp_path: Path) -> None:
    async with stage(tmp_path) as s:
        await s.create("one", RUNS_ON)
        await s.until_step("one", 1)
        await s.stop()
        await s.store.intend(TENANT, "one", Intent.CANCEL)
        await s.restart()
        assert (await s.ended("one")).state is JobState.CANCELLED


async def test_what_is_left_of_a_deleted_job_is_swept(tmp_path: Path) -> None:
    async with stage(tmp_path) as s:
        for name in ("gone", "kept"):
            await s.create(name)
        gone, kept = [await s.ended(name) for name in ("gone", "kept")]
        await s.stop()
        for job in (gone, kept):  # marked, as just before the store forgets it
            s.jobs._folder_of(job).mark_deleted(job.key)
        await s.store.delete_job(TENANT, "gone")
        await s.restart()
        async with asyncio.timeout(5):
            while (tmp_path / "jobs" / gone.uid).exists():
                await asyncio.sleep(0.02)
        assert (tmp_path / "jobs" / kept.uid).exists()


HOST = """
import asyncio, sys
from pathlib import Path
from tests.trainer.job_stage import stage
from tests.trainer.scripted_worker import Script

async def main():
    async with stage(Path(sys.argv[1])) as s:
        await s.create("one", Script(steps=40, step_s=0.05, wait_for="go"))
        print("created", flush=True)
        await asyncio.sleep(600)

asyncio.run(main())
"""


def start_host(root: Path) -> subprocess.Popen[bytes]:
    """A gateway's part in a process of its own."""
    path = os.pathsep.join(path for path in sys.path if path)
    return subprocess.Popen(
        [sys.executable, "-c", HOST, str(root)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        env={"PYTHONPATH": path, "PATH": os.defpath},
    )


def events_told(root: Path) -> int:
    """Lines in the event files of all runs."""
    return sum(path.read_text().count("\n") for path in root.glob("jobs/*/*/*/*.ndjson"))


@pytest.mark.parametrize("step", [pytest.param(0, marks=pytest.mark.slow), 5])
async def test_a_job_survives_a_gateway_that_is_killed(tmp_path: Path, step: int) -> None:
    """A real host, killed with SIGKILL while its training process runs."""
    host = start_host(tmp_path)
    try:
        assert host.stdout is not None
        assert await asyncio.to_thread(host.stdout.readline) == b"created\n"
        async with asyncio.timeout(20):
            while events_told(tmp_path) <= step:
                await asyncio.sleep(0.05)
        host.kill()
        await asyncio.to_thread(host.wait)
        async with stage(tmp_path) as s:
            job = await s.job("one")
            assert not job.state.is_final
            assert len(s.processes(job)) == 1, "it goes on"
            (tmp_path / "go").touch()
            await whole(s, "one", 40)
            assert not s.processes(job)
    finally:
        host.kill()
        host.wait()
        assert host.stdout is not None
        host.stdout.close()
