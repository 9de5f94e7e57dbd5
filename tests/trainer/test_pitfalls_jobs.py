"""Pitfalls of training that jobs on the host have to keep their owners from."""

from __future__ import annotations

from pathlib import Path

import pytest

from store.job_records import DatasetUnknown, JobState
from tests.trainer.job_stage import TENANT, stage
from tests.trainer.scripted_worker import Script
from trainer.events import FailureReason

SECRET = "hf_do-not-tell-anybody"


def environment_of(pid: int) -> bytes:
    return Path(f"/proc/{pid}/environ").read_bytes()


def files_with(text: str, folder: Path) -> list[Path]:
    """Files below a folder in which the text stands."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 5
    return [path for path in files if text.encode() in path.read_bytes()]


async def test_pitfalls_a_file_that_is_not_there_is_refused_before_anything_waits(
    tmp_path: Path,
) -> None:
    async with stage(tmp_path) as s:
        with pytest.raises(DatasetUnknown, match="upload it"):
            await s.jobs.create(TENANT, s.spec().model_copy(update={"dataset": "no"}), name="one")
        assert await s.store.active_jobs() == []


async def test_pitfalls_out_of_memory_ends_the_job_with_advice_and_frees_the_device(
    tmp_path: Path,
) -> None:
    async with stage(tmp_path) as s:
        await s.create("one", Script(fail=FailureReason.OUT_OF_MEMORY))
        job = await s.ended("one")
        assert job.error is not None and job.error["reason"] == "OUT_OF_MEMORY"
        await s.create("two")
        assert (await s.ended("two")).state is JobState.SUCCEEDED


async def test_pitfalls_a_worker_that_the_kernel_kills_for_memory_is_no_success(
    tmp_path: Path,
) -> None:
    async with stage(tmp_path) as s:
        await s.create("one", Script(die_at=1))
        job = await s.ended("one")
        assert job.error is not None and "memory runs out" in job.error["message"]


async def test_pitfalls_a_token_is_in_no_plan_no_event_no_log_and_no_process(
    tmp_path: Path,
) -> None:
    environment = {"PATH": "/usr/bin:/bin", "HF_TOKEN": SECRET}
    async with stage(tmp_path, environment=environment) as s:
        await s.create("one", Script(wait_for="go"))
        job = await s.until("one", JobState.RUNNING)
        for pid in s.processes(job):
            assert SECRET.encode() not in environment_of(pid)
        (tmp_path / "go").touch()
        job = await s.ended("one")
        assert SECRET not in repr(job) + repr(await s.events("one"))
    assert files_with(SECRET, tmp_path) == []


async def test_pitfalls_each_run_has_a_process_of_its_own_on_its_device_alone(
    tmp_path: Path,
) -> None:
    async with stage(tmp_path) as s:
        pids, environments = set(), []
        for name in ("one", "two"):
            await s.create(name, Script(wait_for=f"go-{name}"))
            job = await s.until(name, JobState.RUNNING)
            (pid,) = s.processes(job)
            pids.add(pid)
            environments.append(environment_of(pid).split(b"\0"))
            (tmp_path / f"go-{name}").touch()
            await s.ended(name)
    assert len(pids) == 2
    caches = {v for e in environments for v in e if v.startswith(b"UNSLOTH_COMPILE_LOCATION=")}
    assert len(caches) == 2, "runs side by side do not write the same files"
    assert all(b"CUDA_VISIBLE_DEVICES=" in environment for environment in environments)
