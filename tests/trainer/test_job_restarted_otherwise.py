"""The gateway is started again with another model or other limits while jobs wait."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from store.job_records import JobRecord, JobState
from tests.trainer.job_stage import Stage, served, stage
from tests.trainer.scripted_worker import Script
from trainer.publisher import Finding

WAITING = [JobState.VALIDATING, JobState.QUEUED, JobState.PREPARING]
OTHER_FILES = {"base_model_digest": "1" * 64}


@asynccontextmanager
async def waiting(root: Path, state: JobState) -> AsyncIterator[tuple[Stage, JobRecord]]:
    """A job that stands there, and no process of it; the gateway has ended."""
    async with stage(root) as s:
        if state is JobState.VALIDATING:
            s.preparations.gate.clear()
        if state is JobState.QUEUED:
            await s.create("before", Script(wait_for="go"))
            await s.until("before", JobState.RUNNING)
        await s.create("one", Script(steps=2, load_s=30.0))
        job = await s.until("one", state)
        if state is JobState.PREPARING:
            async with asyncio.timeout(10):
                while not s.processes(job):
                    await asyncio.sleep(0.02)
        await s.stop()
        for pid in s.processes(job):  # as if the crash had come before the start
            os.kill(pid, signal.SIGKILL)
        s.run_folder(job).lock.unlink(missing_ok=True)
        s.preparations.gate.set()
        (root / "go").touch()
        yield s, job


async def failure(s: Stage) -> dict[str, Any]:
    """Of the job, which ended without a process of its own."""
    await s.restart()
    job = await s.ended("one")
    assert job.state is JobState.FAILED and job.error is not None
    assert not s.processes(job) and job.progress is None
    return dict(job.error)


@pytest.mark.parametrize("state", WAITING)
async def test_a_job_is_not_trained_on_another_base_model(tmp_path: Path, state: JobState) -> None:
    async with waiting(tmp_path, state) as (s, _):
        s.served = replace(served(tmp_path), name="other", fingerprints=OTHER_FILES)
        error = await failure(s)
    assert error["reason"] == "TRAINING_UNAVAILABLE" and error["metadata"] == {}
    assert "created for base model 'tiny', and 'other' is served now" in error["message"]
    assert "--model tiny" in error["message"]


@pytest.mark.parametrize("state", WAITING)
async def test_a_job_is_not_trained_on_other_files_of_the_same_name(
    tmp_path: Path, state: JobState
) -> None:
    async with waiting(tmp_path, state) as (s, _):
        s.served = replace(served(tmp_path), fingerprints=OTHER_FILES)
        error = await failure(s)
    assert error["reason"] == "TRAINING_UNAVAILABLE"
    assert "other files of base model 'tiny'" in error["message"]
    assert "base_model_digest changed" in error["message"]


@pytest.mark.parametrize("state", WAITING)
async def test_a_job_is_not_trained_beyond_the_limits_of_today(
    tmp_path: Path, state: JobState
) -> None:
    async with waiting(tmp_path, state) as (s, _):
        s.served = replace(served(tmp_path), max_model_len=1024)
        s.publisher.unservable = [Finding("spec.lora.r", "is 32, and 16 is served: lower it")]
        error = await failure(s)
    assert error["reason"] == "UNSERVABLE_ADAPTER"
    assert error["metadata"] == {"field": "spec.lora.r"}
    assert "spec.lora.r: is 32, and 16 is served" in error["message"]
    assert "spec.data.max_sequence_tokens: rows of 2048 tokens" in error["message"]


@pytest.mark.parametrize("state", WAITING)
async def test_a_job_goes_on_where_all_is_as_it_was(tmp_path: Path, state: JobState) -> None:
    async with waiting(tmp_path, state) as (s, _):
        s.served = replace(served(tmp_path), max_model_len=4096, max_lora_rank=128)
        (tmp_path / "scripts" / "one.json").unlink()
        await s.restart()
        assert (await s.ended("one")).state is JobState.SUCCEEDED


async def test_a_job_that_trains_is_left_to_the_gate(tmp_path: Path) -> None:
    async with stage(tmp_path) as s:
        await s.create("one", Script(steps=4, step_s=0.05, wait_for="go"))
        await s.until_step("one", 1)
        s.served = replace(served(tmp_path), fingerprints=OTHER_FILES)
        await s.restart()
        (tmp_path / "go").touch()
        assert (await s.ended("one")).state is JobState.SUCCEEDED
