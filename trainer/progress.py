"""Tells each step of a run, and ends it where the loss is no number."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from trainer.batches import BatchTokens
from trainer.event_writer import EventWriter
from trainer.events import FailureReason, JobFailure, Progress
from trainer.failure import RunFailed
from trainer.memory import Memory

WINDOW_STEPS = 20
"""That "lately" means."""


@dataclass(frozen=True, slots=True)
class StepTime:
    """Of one step, without evaluation and saving."""

    duration_s: float
    tokens: int


class ProgressTeller(TrainerCallback):  # type: ignore[misc]
    """Writes one event a step and one an evaluation.

    It waits for the device once a step, when the trainer reads the loss, and never in between.
    """

    def __init__(
        self,
        events: EventWriter,
        made: deque[BatchTokens],
        memory: Memory,
        begun: Callable[[], None],
        resumed: Progress | None = None,
    ) -> None:
        """`made`: tokens of micro-batches in their order; `begun` is called before the first.
        `resumed` is where the run stands that is gone on with."""
        self._events = events
        self._made = made
        self._memory = memory
        self._begun = begun
        self.stands = resumed
        """Where the run stands; None: before its first step."""
        self._tokens = BatchTokens(0, 0)
        self._before_s = 0.0
        """That earlier attempts took, as far as they are gone on from."""
        if resumed is not None:
            self._tokens = BatchTokens(resumed.tokens_seen, resumed.trained_tokens)
            self._before_s = resumed.elapsed_s
        self._step_tokens = 0
        self._steps: deque[StepTime] = deque(maxlen=WINDOW_STEPS)
        self._began_s = self._mark_s = 0.0
        self._aside_s = 0.0
        """What evaluating and saving after an epoch took last."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any
    ) -> None:
        self._begun()
        self._began_s = self._mark_s = time.monotonic()

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any
    ) -> None:
        self._mark_s = time.monotonic()  # an evaluation may have come before it

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any
    ) -> None:
        self._count()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any
    ) -> None:
        self._count()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, float],
        **kw: Any,
    ) -> None:
        if "loss" not in logs:  # the summary at the end
            return
        loss, grad_norm = logs["loss"], logs.get("grad_norm")
        now_s = time.monotonic()
        self._steps.append(StepTime(now_s - self._mark_s, self._step_tokens))
        self._mark_s, self._step_tokens = now_s, 0
        require_finite(state.global_step, loss, "loss")
        require_finite(state.global_step, grad_norm or 0.0, "gradient norm")
        self._tell(
            args, state, loss=loss, learning_rate=logs.get("learning_rate"), grad_norm=grad_norm
        )

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: Mapping[str, float],
        **kw: Any,
    ) -> None:
        require_finite(state.global_step, metrics["eval_loss"], "loss of held-out rows")
        self._tell(args, state, eval_loss=metrics["eval_loss"])

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any
    ) -> None:
        now_s = time.monotonic()
        self._aside_s, self._mark_s = now_s - self._mark_s, now_s

    def _count(self) -> None:
        batch = self._made.popleft()
        self._tokens = BatchTokens(
            self._tokens.seen + batch.seen, self._tokens.trained + batch.trained
        )
        self._step_tokens += batch.seen

    def _tell(self, args: TrainingArguments, state: TrainerState, **values: float | None) -> None:
        lately_s = sum(step.duration_s for step in self._steps)
        tokens = sum(step.tokens for step in self._steps)
        left = state.max_steps - state.global_step
        epochs_left = math.ceil(left * (state.epoch or 0.0) / max(1, state.global_step))
        told = Progress(
            step=state.global_step,
            total_steps=state.max_steps,
            epoch=state.epoch or 0.0,
            tokens_seen=self._tokens.seen,
            trained_tokens=self._tokens.trained,
            tokens_per_second=tokens / lately_s if lately_s else 0.0,
            memory_bytes=self._memory.used_bytes(),
            memory_peak_bytes=self._memory.peak_bytes(),
            eta_s=left * lately_s / max(1, len(self._steps)) + epochs_left * self._aside_s,
            elapsed_s=self._before_s + time.monotonic() - self._began_s,
            **values,
        )
        self._events.progress(told)
        self.stands = told.after(self.stands)


def require_finite(step: int, value: float, what: str) -> None:
    """Raise RunFailed for what is no number: nothing that is trained after it is of use."""
    if not math.isfinite(value):
        raise RunFailed(
            JobFailure(
                reason=FailureReason.LOSS_DIVERGED,
                message=f"the {what} is {value} at step {step}: lower "
                "hyperparameters.learning_rate or lora.alpha, and look at the rows of that step",
                metadata={"step": str(step)},
            )
        )
