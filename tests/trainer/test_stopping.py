"""A training process that is asked to end, in whatever it does."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tests.trainer.training_run import Ended, Running, read, start, write_rows
from trainer.checkpoint import folder_of, steps_of, verify
from trainer.events import WorkerEventKind
from trainer.reference import Reference
from trainer.spec import Backend

LONG: dict[str, Any] = {"hyperparameters": {"epochs": 1000, "warmup_ratio": 0.5}}
GRACE_S = 10.0

pytestmark = pytest.mark.slow


def stopped(running: Running) -> tuple[Ended, float]:
    """The end of a run that was asked to end now, and how long that took."""
    asked_s = time.monotonic()
    ended = running.wait()
    assert ended.code == 3, ended.log[-3000:]
    assert ended.exit.stopped and not ended.exit.ok and ended.exit.failure is None
    assert not ended.run.manifest.exists()
    return ended, time.monotonic() - asked_s


@pytest.mark.parametrize("backend", list(Backend))
def test_a_stop_within_steps_saves_the_last_one(
    backend: Backend, tiny: Path, rows: Path, tmp_path: Path
) -> None:
    running = start(tmp_path / "run", tiny, rows, LONG, backend=backend)
    running.wait_for_step(4)
    running.stop(save=True)
    ended, took_s = stopped(running)
    assert took_s < GRACE_S
    last = ended.payloads(WorkerEventKind.CHECKPOINT)[-1]
    assert last["step"] == ended.steps[-1]["step"] >= 4 and last["final"] is False
    folder = folder_of(ended.run, last["step"])
    assert "adapter/adapter_model.safetensors" in verify(folder).files
    assert Reference.model_validate_json((folder / "reference.json").read_text()).rows
    # No evaluation came in between: the last was that of the epoch before.
    evaluated = [
        item["step"]
        for item in ended.payloads(WorkerEventKind.PROGRESS)
        if item["eval_loss"] is not None
    ]
    assert all(step % 3 == 0 for step in evaluated)


def test_a_stop_without_saving_leaves_what_was_there(
    tiny: Path, rows: Path, tmp_path: Path
) -> None:
    running = start(tmp_path / "run", tiny, rows, LONG)
    running.wait_for_step(4)
    running.stop(save=False)
    ended, _ = stopped(running)
    assert all(step % 3 == 0 for step in steps_of(ended.run))


def test_a_stop_while_loading_ends_at_once(tiny: Path, rows: Path, tmp_path: Path) -> None:
    running = start(tmp_path / "run", tiny, rows, LONG)
    running.wait_until(running.run.alive.exists)
    running.stop(save=True)
    ended, took_s = stopped(running)
    assert took_s < 8.0, "before its grace is over"
    assert steps_of(ended.run) == []


def test_a_signal_alone_saves_too(tiny: Path, rows: Path, tmp_path: Path) -> None:
    running = start(tmp_path / "run", tiny, rows, LONG)
    running.wait_for_step(2)
    os.kill(running.process.pid, signal.SIGTERM)
    ended, _ = stopped(running)
    assert steps_of(ended.run)[-1] == ended.steps[-1]["step"] >= 2


def test_the_signal_that_comes_with_a_request_is_not_a_second_one(
    tiny: Path, rows: Path, tmp_path: Path
) -> None:
    running = start(tmp_path / "run", tiny, rows, LONG)
    running.wait_for_step(2)
    running.stop(save=False)
    time.sleep(0.3)
    os.kill(running.process.pid, signal.SIGTERM)
    stopped(running)


def test_a_second_signal_ends_at_once(tiny: Path, tmp_path: Path) -> None:
    # Rows so long that a micro-batch takes a while.
    rows = write_rows(tmp_path / "rows", count=40, longest=500)
    fields = {"hyperparameters": {"micro_batch_size": 32, "precision": "float32"}}
    running = start(tmp_path / "run", tiny, rows, fields)
    running.wait_until(lambda: '"loaded"' in read(running.run.events))
    os.kill(running.process.pid, signal.SIGTERM)
    time.sleep(0.05)
    os.kill(running.process.pid, signal.SIGTERM)
    asked_s = time.monotonic()
    assert running.process.wait(30) == 128 + signal.SIGTERM
    assert time.monotonic() - asked_s < 5.0


def test_a_stop_in_an_evaluation_does_not_wait_for_its_end(
    tiny: Path, rows: Path, tmp_path: Path
) -> None:
    held_out = write_rows(tmp_path / "held-out", count=20_000, longest=200)
    running = start(tmp_path / "run", tiny, rows, LONG, eval_rows=str(held_out))
    running.wait_for_step(3)  # the last of the first epoch
    time.sleep(1.0)
    running.stop(save=True)
    ended, took_s = stopped(running)
    assert took_s < GRACE_S
    assert steps_of(ended.run) == [3]
    assert [item["step"] for item in ended.steps] == [1, 2, 3]
    assert ended.payloads(WorkerEventKind.PROGRESS)[-1]["eval_loss"] is None


def test_it_shows_that_it_lives(tiny: Path, rows: Path, tmp_path: Path) -> None:
    running = start(tmp_path / "run", tiny, rows, LONG)
    seen: set[int] = set()
    running.wait_until(lambda: _note(running, seen) >= 4)


def _note(running: Running, seen: set[int]) -> int:
    if running.run.alive.exists():
        seen.add(running.run.alive.stat().st_mtime_ns)
    return len(seen)
