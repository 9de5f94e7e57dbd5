"""A device that lacks memory: the same step in smaller pieces, each time in a new process."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from store.job_records import EventKind, JobState
from tests.trainer.job_stage import TENANT, served, stage
from tests.trainer.scripted_worker import Script
from trainer.recovery import recovery_of
from trainer.run_folder import RunPlan
from trainer.spec import Hyperparameters, JobSpec


async def test_rows_at_once_are_halved_until_they_fit_and_the_step_stays(tmp_path: Path) -> None:
    async with stage(tmp_path) as s:
        await s.create("one", Script(memory_rows=2), micro_batch_size=8, gradient_accumulation=3)
        job = await s.ended("one")
        assert (job.state, job.attempt) == (JobState.SUCCEEDED, 3), job.error
        shapes = []
        for attempt in (1, 2, 3):
            plan = RunPlan.model_validate_json(s.run_folder(job, attempt).plan.read_bytes())
            asked = plan.spec.hyperparameters
            shapes.append((asked.micro_batch_size, asked.gradient_accumulation))
        assert shapes == [(8, 3), (4, 6), (2, 12)]
        told = recovery_of(job)
        assert (told.spent, told.too_large) == (0, (8, 4)), "no attempt counts"
        effective = JobSpec.model_validate(job.effective_spec).hyperparameters
        assert effective.micro_batch_size == 2
        assert [notice["code"] for notice in job.notices] == ["MICRO_BATCH_HALVED"] * 2
        events = await s.events("one")
        assert [e.payload["code"] for e in events if e.kind is EventKind.NOTICE] == [
            "MICRO_BATCH_HALVED",
            "MICRO_BATCH_HALVED",
        ]


async def test_one_row_that_does_not_fit_fails_with_all_that_was_tried(tmp_path: Path) -> None:
    async with stage(tmp_path) as s:
        script = Script(memory_rows=-1)
        await s.create("one", script, micro_batch_size=4, gradient_accumulation=1)
        job = await s.ended("one")
        assert job.state is JobState.FAILED and job.error is not None
        assert job.error["reason"] == "OUT_OF_MEMORY"
        assert job.error["metadata"]["tried"] == "4, 2, 1, 1"
        assert "data.max_sequence_tokens" in job.error["message"]
        assert job.attempt == 4


async def test_what_was_saved_before_memory_ran_out_is_gone_on_from(tmp_path: Path) -> None:
    async with stage(tmp_path) as s:
        script = Script(steps=5, save_each=True, memory_rows=1, memory_from=3)
        await s.create("one", script, micro_batch_size=2, gradient_accumulation=2)
        job = await s.ended("one")
        assert job.state is JobState.SUCCEEDED
        assert await s.steps("one") == [1, 2, 3, 4, 5]


async def test_an_estimate_remembers_what_did_not_fit(tmp_path: Path, tiny: Path) -> None:
    async with stage(tmp_path, served=replace(served(tmp_path), path=tiny)) as s:
        await s.create("one", Script(memory_rows=2), micro_batch_size=8)
        assert (await s.ended("one")).state is JobState.SUCCEEDED

        async def warnings(rows: int) -> list[str]:
            asked = Hyperparameters(micro_batch_size=rows)
            spec = s.spec().model_copy(update={"hyperparameters": asked})
            estimate = await s.jobs.estimate(TENANT, spec)
            assert not estimate.measured, "its time is not that of one attempt"
            return [text for text in estimate.warnings if "out of memory" in text]

        [warning] = await warnings(4)
        assert "job 'one', which was like it, ran out of memory with 4 rows" in warning
        assert "trained with 2" in warning
        assert await warnings(2) == []
