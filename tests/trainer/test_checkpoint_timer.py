"""Checkpoints by time: no more is lost than the interval."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerControl, TrainerState

from trainer.checkpoint import folder_of, seal
from trainer.checkpoint_timer import CheckpointTimer
from trainer.run_folder import RunFolder

NOTHING: Any = None


class Loop:
    """A trainer whose steps take what they are said to, and whose saving takes 3 s."""

    def __init__(self, run: RunFolder, interval_s: float, epoch_steps: int = 1000) -> None:
        self.run = run
        self.now_s = 100.0
        self.timer = CheckpointTimer(run, interval_s, epoch_steps, lambda: self.now_s)
        self.state, self.control = TrainerState(), TrainerControl()
        self.timer.on_train_begin(NOTHING, self.state, self.control)
        self.lost_s = self.most_lost_s = 0.0
        self.saved: list[int] = []

    def step(self, duration_s: float, *, ends: bool = False) -> None:
        self.state.global_step += 1
        self.control.should_save, self.control.should_training_stop = False, ends
        self.timer.on_step_begin(NOTHING, self.state, self.control)
        self.now_s += duration_s
        self.lost_s += duration_s
        self.most_lost_s = max(self.most_lost_s, self.lost_s)
        self.timer.on_step_end(NOTHING, self.state, self.control)
        if self.control.should_save:
            self.save()

    def save(self) -> None:
        self.now_s += 3.0
        folder = folder_of(self.run, self.state.global_step)
        folder.mkdir(parents=True)
        seal(folder, self.state.global_step, None)
        self.timer.on_save(NOTHING, self.state, self.control)
        self.saved.append(self.state.global_step)
        self.lost_s = 0.0


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path)


def test_what_a_kill_may_lose_is_within_the_interval(run: RunFolder) -> None:
    loop = Loop(run, interval_s=60.0)
    for _ in range(100):
        loop.step(7.0)
    assert 50.0 < loop.most_lost_s <= 60.0
    assert loop.saved[:3] == [8, 16, 24]


def test_a_step_as_long_as_the_interval_is_saved_each_time(run: RunFolder) -> None:
    loop = Loop(run, interval_s=60.0)
    for _ in range(4):
        loop.step(90.0)
    assert loop.saved == [1, 2, 3, 4]


def test_an_interval_that_is_never_reached_adds_no_checkpoint(run: RunFolder) -> None:
    loop = Loop(run, interval_s=600.0, epoch_steps=10)
    for step in range(1, 31):
        loop.step(5.0)
        if step % 10 == 0:
            loop.save()
    assert loop.saved == [10, 20, 30]


def test_what_the_trainer_saves_anyway_is_not_saved_twice(run: RunFolder) -> None:
    loop = Loop(run, interval_s=1.0, epoch_steps=2)
    loop.step(5.0)
    loop.step(5.0)
    assert loop.saved == [1], "the second step is the last of its epoch"
    loop.step(5.0, ends=True)
    assert loop.saved == [1], "the third is the last of all"


def test_a_checkpoint_that_is_whole_is_not_written_over(run: RunFolder) -> None:
    loop = Loop(run, interval_s=1.0)
    loop.step(5.0)
    loop.control.should_save = True
    loop.timer.on_epoch_end(NOTHING, loop.state, loop.control)
    assert not loop.control.should_save
    loop.state.global_step = 2
    loop.control.should_save = True
    loop.timer.on_epoch_end(NOTHING, loop.state, loop.control)
    assert loop.control.should_save
