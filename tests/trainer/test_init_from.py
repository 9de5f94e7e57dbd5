"""Jobs that begin with what another job or a version has, whatever becomes of that."""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from store.job_records import JobRecord, JobState, JobUnknown, QueueFull
from store.records import VersionUnknown
from store.upload_folder import StorageFull
from tests.trainer.job_stage import TENANT, Stage, stage
from tests.trainer.scripted_worker import Script
from trainer import held_weights
from trainer.checkpoint import sha256_of
from trainer.errors import CheckpointUnknown, InitFromUnusable, InvalidSpec
from trainer.job_folder import JobFolder
from trainer.run_folder import RunPlan
from trainer.spec import JobSpec

VERSION = {"adapter_version": {"adapter": "pirate"}}
CHECKPOINT = {"checkpoint": {"job": "one"}}


def spec(init_from: Mapping[str, Any], **fields: object) -> JobSpec:
    return JobSpec.model_validate(
        {"dataset": "data", "adapter": "sailor", "init_from": init_from, **fields}
    )


async def create(s: Stage, name: str, init_from: Mapping[str, Any], **fields: object) -> JobRecord:
    return await s.jobs.create(TENANT, spec(init_from, **fields), name=name)


def held(s: Stage, job: JobRecord) -> Path:
    return JobFolder(s.root / "jobs" / job.uid).initial_weights


def plan(s: Stage, job: JobRecord, attempt: int = 1) -> RunPlan:
    return RunPlan.model_validate_json(s.run_folder(job, attempt).plan.read_bytes())


def left_over(s: Stage) -> list[Path]:
    return list((s.root / "jobs").glob("*.new"))


async def test_a_job_begins_with_a_version_and_has_its_shape(tmp_path: Path) -> None:
    async with stage(tmp_path) as s:
        s.library.put(version=1)
        source = s.library.put(version=2, rank=4)
        created = await create(s, "two", {"adapter_version": {"adapter": "pirate", "version": 2}})
        job = await s.ended("two")
        assert job.state is JobState.SUCCEEDED, job.error
        assert created.spec["init_from"] == {
            "adapter_version": {"adapter": "pirate", "version": 2}
        }, "as it was asked for"
        effective = JobSpec.model_validate(job.effective_spec)
        assert effective.init_from is not None
        assert effective.init_from.text == "pirate@2"
        assert effective.init_from.weights_sha256 == source.weights_sha256
        assert (effective.lora.r, effective.lora.alpha) == (4, 16.0)
        assert effective.lora.target_modules == ("q_proj", "v_proj")
        assert plan(s, job).initial_weights == str(held(s, job))
        assert sha256_of(held(s, job)) == source.weights_sha256
        assert not left_over(s)
        assert job.manifest is not None
        assert job.manifest["effective_spec"]["init_from"]["weights_sha256"]


async def test_a_version_that_is_not_named_is_the_one_with_the_most_traffic(
    tmp_path: Path,
) -> None:
    async with stage(tmp_path) as s:
        for version in (1, 2):
            s.library.put(version=version)
        s.library.most_asked = 2
        job = await create(s, "two", VERSION)
        effective = JobSpec.model_validate(job.effective_spec)
        assert effective.init_from is not None and effective.init_from.text == "pirate@2"


async def test_a_job_begins_with_a_checkpoint_as_it_was_trained(tmp_path: Path) -> None:
    async with stage(tmp_path) as s:
        await s.create("one", Script(steps=3, save_each=True))
        source = await s.ended("one")
        saved = s.run_folder(source).checkpoints
        older = {"checkpoint": {"job": "one", "step": 2}}
        asked_for: dict[str, tuple[Mapping[str, Any], int]]
        asked_for = {"newest": (CHECKPOINT, 3), "older": (older, 2)}
        for name, (asked, step) in asked_for.items():
            await create(s, name, asked)
            job = await s.ended(name)
            assert job.state is JobState.SUCCEEDED, job.error
            effective = JobSpec.model_validate(job.effective_spec)
            assert effective.init_from is not None and effective.init_from.text == f"one/{step}"
            theirs = saved / f"checkpoint-{step}" / "adapter_model.safetensors"
            assert effective.init_from.weights_sha256 == sha256_of(theirs)
            assert held(s, job).samefile(theirs), "no byte is copied"
            theirs_lora = JobSpec.model_validate(source.effective_spec).lora
            assert set(effective.lora.target_modules) == set(theirs_lora.target_modules)
            assert effective.lora.scale == theirs_lora.scale


async def test_what_it_begins_with_outlives_where_it_comes_from(tmp_path: Path) -> None:
    async with stage(tmp_path) as s:
        await s.create("one", Script(steps=3))
        source = await s.ended("one")
        s.library.put()
        s.preparations.gate.clear()
        jobs = [await create(s, "two", VERSION), await create(s, "three", CHECKPOINT)]
        await s.jobs.delete(TENANT, "one")
        assert not s.run_folder(source).path.exists()
        shutil.rmtree(tmp_path / "library")
        s.library.versions.clear()
        s.preparations.gate.set()
        for job in jobs:
            after = await s.ended(job.name)
            assert after.state is JobState.SUCCEEDED, after.error
            effective = JobSpec.model_validate(job.effective_spec)
            assert effective.init_from is not None
            assert sha256_of(held(s, job)) == effective.init_from.weights_sha256
        await s.jobs.delete(TENANT, "two")
        assert not held(s, jobs[0]).exists(), "it goes with the job"


async def test_an_attempt_that_goes_on_takes_its_checkpoint(tmp_path: Path) -> None:
    async with stage(tmp_path) as s:
        s.library.put()
        script = Script(steps=4, save_at=2, die_after=2, well_from=9)
        (tmp_path / "scripts").mkdir()
        (tmp_path / "scripts" / "two.json").write_text(script.model_dump_json())
        await create(s, "two", VERSION)
        job = await s.ended("two")
        assert (job.state, job.attempt) == (JobState.SUCCEEDED, 2), job.error
        first, second = plan(s, job, 1), plan(s, job, 2)
        assert first.initial_weights and not first.resume
        assert second.resume and not second.initial_weights


async def test_an_attempt_without_a_checkpoint_begins_with_it_again(tmp_path: Path) -> None:
    async with stage(tmp_path) as s:
        s.library.put()
        script = Script(steps=3, die_at=2, well_from=2)
        (tmp_path / "scripts").mkdir()
        (tmp_path / "scripts" / "two.json").write_text(script.model_dump_json())
        await create(s, "two", VERSION)
        job = await s.ended("two")
        assert (job.state, job.attempt) == (JobState.SUCCEEDED, 2), job.error
        assert plan(s, job, 2).initial_weights == plan(s, job, 1).initial_weights != ""


async def test_a_job_without_what_it_begins_with_fails_and_does_not_begin_anew(
    tmp_path: Path,
) -> None:
    async with stage(tmp_path) as s:
        s.library.put()
        s.preparations.gate.clear()
        job = await create(s, "two", VERSION)
        held(s, job).unlink()
        s.preparations.gate.set()
        job = await s.ended("two")
        assert job.state is JobState.FAILED and job.error is not None
        assert job.error["reason"] == "INIT_FROM_UNUSABLE"
        assert job.error["metadata"] == {"init_from": "pirate@1"}
        assert not s.run_folder(job).lock.exists(), "no process was started"


# --- what is refused ---------------------------------------------------------


async def refusal(s: Stage, asked: JobSpec, kind: type[Exception]) -> str:
    """What `check`, `estimate` and `create` say, which is the same; nothing is kept."""
    said = set[str]()
    for call in (s.jobs.check, s.jobs.estimate, s.jobs.create):
        with pytest.raises(kind) as raised:
            await call(TENANT, asked)
        said.add(str(raised.value))
    assert len(said) == 1
    assert await s.store.active_jobs() == [] and not left_over(s)
    return said.pop()


async def test_what_is_not_there_is_refused(tmp_path: Path) -> None:
    async with stage(tmp_path) as s:
        s.library.put(tenant="other")
        await refusal(s, spec(VERSION), VersionUnknown)
        await refusal(s, spec(CHECKPOINT), JobUnknown)
        await s.create("one", Script(steps=2))
        await s.ended("one")
        digest = (await s.store.dataset(TENANT, "data")).sha256
        await s.store.add_dataset("other", "data", sha256=digest, size_bytes=1, format="")
        with pytest.raises(JobUnknown):
            await s.jobs.check("other", spec(CHECKPOINT))
        said = await refusal(s, spec({"checkpoint": {"job": "one", "step": 7}}), CheckpointUnknown)
        assert "step 7" in said


async def test_what_was_trained_on_another_base_model_is_refused(tmp_path: Path) -> None:
    async with stage(tmp_path) as s:
        s.library.put(fingerprints={"base_model_digest": "1" * 64})
        said = await refusal(s, spec(VERSION), InitFromUnusable)
        assert "base_model_digest differ" in said and said.startswith("pirate@1, ")
        s.library.put(fingerprints={"base_model_digest": "0" * 64})
        await s.jobs.check(TENANT, spec(VERSION))
        s.library.put(fingerprints={"base_model_digest": ""})  # whoever made it did not tell
        await s.jobs.check(TENANT, spec(VERSION))

        await s.create("one", Script(steps=2))
        await s.ended("one")
        s.jobs._means.served.fingerprints["base_model_digest"] = "2" * 64  # type: ignore[index]
        said = await refusal(s, spec(CHECKPOINT), InitFromUnusable)
        assert said.startswith("one/2, ") and "base_model_digest differ" in said


async def test_another_shape_and_other_weights_are_refused(tmp_path: Path) -> None:
    async with stage(tmp_path) as s:
        source = s.library.put()
        said = await refusal(s, spec(VERSION, lora={"r": 9}), InvalidSpec)
        assert said.startswith("spec.lora.r: is 9, and pirate@1")
        said = await refusal(s, spec({**VERSION, "weights_sha256": "f" * 64}), InitFromUnusable)
        assert source.weights_sha256 in said and "f" * 64 in said
        asked = spec({**VERSION, "weights_sha256": source.weights_sha256})
        await s.jobs.check(TENANT, asked)
        # What was resolved can be asked for again.
        resolved = await s.jobs.check(TENANT, asked)
        assert await s.jobs.check(TENANT, resolved) == resolved


async def test_a_damaged_source_is_refused_once_its_bytes_are_looked_at(tmp_path: Path) -> None:
    async with stage(tmp_path) as s:
        source = s.library.put()
        content = bytearray(source.weights.read_bytes())
        content[-1] ^= 1
        source.weights.write_bytes(content)
        with pytest.raises(InitFromUnusable, match="damaged"):
            await create(s, "two", VERSION)
        assert await s.store.active_jobs() == [] and not left_over(s)
        source.weights.unlink()
        await refusal(s, spec(VERSION), InitFromUnusable)


async def test_a_full_disk_keeps_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with stage(tmp_path) as s:
        s.library.put()

        def full(*paths: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patched:
            patched.setattr(held_weights, "sync_path", full)
            with pytest.raises(StorageFull):
                await create(s, "two", VERSION)
        assert await s.store.active_jobs() == [] and not left_over(s)
        await create(s, "two", VERSION)


async def test_a_disk_that_cannot_link_holds_a_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def across(*paths: object) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    async with stage(tmp_path) as s:
        source = s.library.put()
        monkeypatch.setattr(os, "link", across)
        job = await create(s, "two", VERSION)
        assert not held(s, job).samefile(source.weights)
        assert sha256_of(held(s, job)) == source.weights_sha256


# --- crashes, and calls that come twice --------------------------------------


async def test_a_request_that_comes_again_has_its_job_without_the_source(tmp_path: Path) -> None:
    async with stage(tmp_path) as s:
        s.library.put()
        made = await s.jobs.create(TENANT, spec(VERSION), request_id="r")
        s.library.versions.clear()
        again = await s.jobs.create(TENANT, spec(VERSION), request_id="r")
        assert again.uid == made.uid and not left_over(s)


async def test_two_equal_requests_at_once_make_one_job(tmp_path: Path) -> None:
    async with stage(tmp_path) as s:
        s.library.put()
        calls = [s.jobs.create(TENANT, spec(VERSION), request_id="r") for _ in range(3)]
        made = {job.uid for job in await asyncio.gather(*calls)}
        assert len(made) == 1 and not left_over(s)
        assert len(list((s.root / "jobs").glob("*/initial"))) == 1


async def test_a_job_that_is_refused_holds_nothing(tmp_path: Path) -> None:
    async with stage(tmp_path, max_active=0) as s:
        s.library.put()
        with pytest.raises(QueueFull):
            await create(s, "two", VERSION)
        assert not left_over(s)


async def test_a_crash_before_and_after_the_job_is_made_is_settled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with stage(tmp_path) as s:
        source = s.library.put()
        s.preparations.gate.clear()

        def killed(jobs: Path, uid: str) -> None:
            raise OSError(errno.EIO, "as if we were gone")

        with monkeypatch.context() as patched:
            patched.setattr(held_weights, "settle", killed)
            job = await create(s, "two", VERSION)
        held_weights.hold(s.root / "jobs", "f" * 32, source.weights, source.weights_sha256)
        assert len(left_over(s)) == 2 and not held(s, job).exists()
        s.preparations.gate.set()
        await s.restart()
        job = await s.ended("two")
        assert job.state is JobState.SUCCEEDED, job.error
        assert plan(s, job).initial_weights == str(held(s, job))
        assert not left_over(s) and not (s.root / "jobs" / ("f" * 32)).exists()
