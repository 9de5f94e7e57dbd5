"""Has the trainer save by time, so that an epoch of hours is not lost as a whole."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from trainer import checkpoint as files
from trainer.run_folder import RunFolder


class CheckpointTimer(TrainerCallback):  # type: ignore[misc]
    """Comes after all others: what they want, and what saving takes, is known then.

    Work is lost from the last checkpoint on, so it saves before a step that would end too late,
    if the last one says how long a step takes.
    """

    def __init__(
        self,
        run: RunFolder,
        interval_s: float,
        epoch_steps: int,
        clock_s: Callable[[], float] = time.monotonic,
    ) -> None:
        """`epoch_steps` is how many steps an epoch has, after which the trainer saves anyway."""
        self._run = run
        self._interval_s = interval_s
        self._epoch_steps = epoch_steps
        self._clock_s = clock_s
        self._saved_s = self._began_s = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any
    ) -> None:
        self._saved_s = self._clock_s()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any
    ) -> None:
        self._began_s = self._clock_s()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any
    ) -> None:
        saved_soon = control.should_training_stop or state.global_step % self._epoch_steps == 0
        now_s = self._clock_s()
        next_s = now_s + (now_s - self._began_s)
        if not saved_soon and next_s - self._saved_s > self._interval_s:
            control.should_save = True

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any
    ) -> None:
        # The trainer would write into the folder of a checkpoint that is whole.
        if files.is_sealed(files.folder_of(self._run, state.global_step)):
            control.should_save = False

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any
    ) -> None:
        self._saved_s = self._clock_s()
