"""Cancelling in each state: in time, with nothing left that runs, with what was saved."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from store.job_records import EventKind, Intent, JobState
from tests.trainer.job_stage import TENANT, Stage, stage
from tests.trainer.scripted_worker import Script

SLOW = Script(steps=10_000, step_s=0.05)


async def cancelled_after(s: Stage, name: str, *, discard: bool = False) -> float:
    """Cancel, and see it through: seconds until it was CANCELLED."""
    began_s = time.monotonic()
    asked = await s.jobs.cancel(TENANT, name, discard=discard)
    assert asked.state is JobState.CANCELLING
    job = await s.ended(name)
    assert job.state is JobState.CANCELLED
    assert not s.processes(job)
    assert (await s.states(name))[-2:] == ["cancelling", "cancelled"]
    return time.monotonic() - began_s


async def test_a_running_job_saves_and_ends(tmp_path: Path) -> None:
    async with stage(tmp_path) as s:
        await s.create("one", SLOW)
        await s.until_step("one", 2)
        took_s = await cancelled_after(s, "one")
        saved = await s.jobs.checkpoints(TENANT, "one")
        events = await s.events("one")
        job = await s.job("one")
    assert took_s < 8.0, "before its grace is over"
    assert len(saved) == 1 and saved[0].step >= 2
    last = [e.payload["step"] for e in events if e.kind is EventKind.PROGRESS][-1]
    assert last == saved[0].step, "all that it said is told, up to its end"
    assert job.intent is Intent.CANCEL
    assert job.publication["state"] == "pending"


async def test_discard_keeps_no_checkpoint(tmp_path: Path) -> None:
    async with stage(tmp_path) as s:
        await s.create("one", SLOW.model_copy(update={"save_each": True}))
        job = await s.until_step("one", 2)
        await cancelled_after(s, "one", discard=True)
        assert await s.jobs.checkpoints(TENANT, "one") == []
        assert not s.run_folder(job).checkpoints.exists()


@pytest.mark.parametrize(
    "unkillable", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["deaf", "unkillable"]
)
async def test_a_process_that_does_not_listen_is_ended(tmp_path: Path, unkillable: bool) -> None:
    script = SLOW.model_copy(
        update={"deaf": True, "unkillable": unkillable, "child": True, "save_each": True}
    )
    async with stage(tmp_path, grace_s=1.5) as s:
        await s.create("one", script)
        job = await s.until_step("one", 1)
        assert len(s.processes(job)) == 2
        took_s = await cancelled_after(s, "one")
        assert 1.5 <= took_s < 1.5 + 10
        assert await s.jobs.checkpoints(TENANT, "one"), "what was saved before is kept"


async def test_a_process_that_loads_has_nothing_to_save_and_gets_no_grace(tmp_path: Path) -> None:
    async with stage(tmp_path, grace_s=60.0) as s:
        await s.create("one", Script(load_s=60.0, deaf=True))
        job = await s.until("one", JobState.PREPARING)
        async with asyncio.timeout(10):
            while not s.run_folder(job).alive.exists():
                await asyncio.sleep(0.02)
        assert await cancelled_after(s, "one") < 4.0


async def test_a_waiting_job_is_cancelled_at_once_and_gives_up_its_place(tmp_path: Path) -> None:
    async with stage(tmp_path) as s:
        await s.create("a", Script(wait_for="go"))
        await s.until("a", JobState.RUNNING)
        for name in "bc":
            await s.create(name)
            await s.until(name, JobState.QUEUED)
        assert await cancelled_after(s, "b") < 1.0
        assert s.jobs.queue_position(await s.job("c")) == 1
        (tmp_path / "go").touch()
        assert (await s.ended("c")).state is JobState.SUCCEEDED
        assert (await s.job("b")).attempt == 0


async def test_a_job_whose_dataset_is_read_is_cancelled_at_once(tmp_path: Path) -> None:
    async with stage(tmp_path) as s:
        s.preparations.gate.clear()
        await s.create("one")
        async with asyncio.timeout(5):
            while not s.preparations.waiting:
                await asyncio.sleep(0.01)
        assert await cancelled_after(s, "one") < 1.0
        assert not s.preparations.waiting


async def test_a_publication_is_cancelled_and_the_adapter_kept(tmp_path: Path) -> None:
    async with stage(tmp_path) as s:
        s.publisher.gate.clear()
        await s.create("one")
        await s.until("one", JobState.FINALIZING)
        async with asyncio.timeout(5):
            while not s.publisher.published:
                await asyncio.sleep(0.01)
        assert await cancelled_after(s, "one") < 1.0
        job = await s.job("one")
        assert s.publisher.cancelled == 1
        assert job.publication["state"] == "failed"
        assert "cancelled" in job.publication["reasons"][0]
        assert len(await s.jobs.checkpoints(TENANT, "one")) == 1


async def test_a_publication_that_was_through_is_told(tmp_path: Path) -> None:
    async with stage(tmp_path) as s:
        s.publisher.gate.clear()
        s.publisher.stubborn = True
        await s.create("one")
        await s.until("one", JobState.FINALIZING)
        async with asyncio.timeout(5):
            while not s.publisher.published:
                await asyncio.sleep(0.01)
        await cancelled_after(s, "one")
        assert (await s.job("one")).publication["state"] == "serving"


async def test_a_device_is_free_again_after_a_cancel(tmp_path: Path) -> None:
    async with stage(tmp_path) as s:
        await s.create("a", SLOW)
        await s.until_step("a", 1)
        await s.create("b")
        await cancelled_after(s, "a")
        assert (await s.ended("b")).state is JobState.SUCCEEDED


async def test_cancelling_a_job_that_has_ended_changes_nothing(tmp_path: Path) -> None:
    async with stage(tmp_path) as s:
        await s.create("one")
        before = await s.ended("one")
        assert await s.jobs.cancel(TENANT, "one", discard=True) == before
        assert len(await s.jobs.checkpoints(TENANT, "one")) == 1


async def test_a_second_cancel_may_discard(tmp_path: Path) -> None:
    async with stage(tmp_path) as s:
        await s.create("one", SLOW.model_copy(update={"save_s": 0.5}))
        await s.until_step("one", 1)
        await s.jobs.cancel(TENANT, "one", discard=False)
        await s.jobs.cancel(TENANT, "one", discard=True)
        await s.jobs.cancel(TENANT, "one", discard=False)
        assert (await s.ended("one")).state is JobState.CANCELLED
        assert await s.jobs.checkpoints(TENANT, "one") == []


@pytest.mark.slow
async def test_a_cancel_at_any_moment_ends_with_nothing_left(tmp_path: Path) -> None:
    async with stage(tmp_path) as s:
        for number in range(12):
            name = f"job-{number}"
            await s.create(name, Script(steps=3, step_s=0.03, child=True))
            await asyncio.sleep(number * 0.08)
            await s.jobs.cancel(TENANT, name, discard=False)
            job = await s.ended(name)
            assert job.state in (JobState.CANCELLED, JobState.SUCCEEDED)
            assert not s.processes(job)
        await s.create("last")
        assert (await s.ended("last")).state is JobState.SUCCEEDED
