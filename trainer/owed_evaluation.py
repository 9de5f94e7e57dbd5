"""The evaluation that a run owes: it was asked to end before it had measured what it had learned.

An unbroken run measures after each epoch. One that is stopped in the last step of an epoch, or in
the evaluation itself, saves that it owes it, and who goes on measures first.
"""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from trainer.checkpoint import CheckpointManifest
from trainer.checkpointing import Stopper
from trainer.training_loop import RecipeTrainer


class NoStepLeft(Exception):
    """The run ends before a step: it was asked to, or all of them were done before."""


class Evaluations(TrainerCallback):  # type: ignore[misc]
    """Knows after which steps is measured, and whether that was done."""

    def __init__(self, epoch_steps: int | None, resumed: CheckpointManifest | None) -> None:
        """`epoch_steps` is how many steps an epoch has; None: nothing is held out. `resumed` is
        what is gone on from."""
        self._epoch_steps = epoch_steps
        self._measured_at: int | None = None
        """The step."""
        if resumed is not None and not resumed.evaluation_owed:
            self._measured_at = resumed.step

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any
    ) -> None:
        self._measured_at = state.global_step

    def owed(self, state: TrainerState) -> bool:
        """Whether what a run has learned by now is to be measured, and was not."""
        step = state.global_step
        if self._epoch_steps is None or step == self._measured_at:
            return False
        return bool(step % self._epoch_steps == 0 or step >= state.max_steps)


class OwedEvaluation(TrainerCallback):  # type: ignore[misc]
    """Pays it before the first step. Comes after all others, which begin then."""

    def __init__(self, trainer: RecipeTrainer, stopper: Stopper) -> None:
        self._trainer = trainer
        self._stopper = stopper

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any
    ) -> None:
        self._trainer.evaluate()
        if self._stopper.stopped:  # what is gone on from is as good for the next
            raise NoStepLeft
        if state.global_step >= state.max_steps:
            self._trainer.save()
            raise NoStepLeft
