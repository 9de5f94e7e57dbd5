"""An attempt that is followed by another ends by itself, and nothing that it does counts."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from transformers import TrainerControl, TrainerState

from store.job_records import JobState
from tests.trainer.job_stage import stage
from tests.trainer.scripted_worker import Script
from trainer import attempt as attempt_module
from trainer.checkpoint import folder_of, is_sealed
from trainer.checkpointing import CheckpointFinisher
from trainer.events import FailureReason, JobFailure
from trainer.fence import Fence, Fenced, fence_of, raise_fence
from trainer.process import TrainingProcess, kill_all
from trainer.run_folder import RunExit, RunFolder, write_whole

ROOT = Path(__file__).parents[2]


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    folder = tmp_path / "uid" / "attempts" / "1"
    folder.mkdir(parents=True)
    return RunFolder(folder)


def test_it_holds_until_a_newer_attempt_begins(run: RunFolder) -> None:
    fence = Fence(run, 1)
    assert fence.holds, "nobody has said anything"
    raise_fence(run, 1)
    fence.check()
    raise_fence(run, 2)
    assert not fence.holds
    with pytest.raises(Fenced, match="attempt 1"):
        fence.check()
    Fence(run, 2).check()
    fence_of(run).write_text("rubbish")
    assert fence.holds, "what cannot be read fences nobody"


def test_a_training_process_that_is_followed_by_another_ends(run: RunFolder) -> None:
    code = f"""
import time
from pathlib import Path
from trainer.fence import Fence
from trainer.life import Life
from trainer.run_folder import RunFolder
run = RunFolder(Path({str(run.path)!r}))
with Life(run, Fence(run, 1), lambda: None) as life:
    print("begun", flush=True)
    time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None and process.stdout.readline() == b"begun\n"
        raise_fence(run, 2)
        assert process.wait(30) == 4
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()
    assert not run.exit.exists()


@pytest.mark.parametrize("newest", [1, 2])
def test_a_checkpoint_is_sealed_by_the_newest_attempt_alone(run: RunFolder, newest: int) -> None:
    raise_fence(run, newest)
    quiet = SimpleNamespace(gets_on=lambda: None, checkpoint=lambda told: None)
    progress = SimpleNamespace(stands=None)
    stopper = SimpleNamespace(stopped=False)
    folder = folder_of(run, 3)
    folder.mkdir(parents=True)
    nothing: Any = None
    finisher = CheckpointFinisher(
        run,
        1,
        2,
        cast(Any, quiet),
        cast(Any, progress),
        cast(Any, stopper),
        cast(Any, quiet),
        Fence(run, 1),
        lambda folder, model: None,
    )
    state = TrainerState(global_step=3, max_steps=9)
    with pytest.raises(Fenced) if newest > 1 else nullcontext():
        finisher.on_save(nothing, state, TrainerControl(), nothing)
    assert is_sealed(folder) == (newest == 1)


async def test_an_attempt_that_nobody_could_end_overwrites_and_publishes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with stage(tmp_path) as s:
        await s.create("one", Script(steps=10_000, step_s=0.02, save_at=5))
        job = await s.until_step("one", 6)
        zombie = TrainingProcess.find(s.run_folder(job, 1))
        assert zombie is not None
        with monkeypatch.context() as patch:
            patch.setattr(attempt_module, "kill_all", lambda run: True)
            (s.root / "scripts" / "one.json").write_text(Script(steps=8).model_dump_json())
            failure = JobFailure(
                reason=FailureReason.TRAINER_FAILED, message="so it seems", retryable=True
            )
            write_whole(s.run_folder(job, 1).exit, RunExit(ok=False, failure=failure))
            job = await s.ended("one")
        assert (job.state, job.attempt) == (JobState.SUCCEEDED, 2)
        assert job.manifest is not None and job.manifest["checkpoint"]["step"] == 8
        told = await s.steps("one")
        assert told[-3:] == [6, 7, 8]
        assert zombie.running, "it does not look at the fence before it saves"
        # It saves when it is asked to, if it may.
        zombie.terminate()
        async with asyncio.timeout(20):
            while zombie.running:
                await asyncio.sleep(0.02)
        zombie.close()
        saved = s.run_folder(job, 1).checkpoints.glob("checkpoint-*")
        assert {path.name for path in saved if is_sealed(path)} <= {"checkpoint-5"}
        assert await s.job("one") == job
        assert len(s.publisher.published) == 1
        assert kill_all(s.run_folder(job, 1))
