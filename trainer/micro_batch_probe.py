"""Tries a shape with the trainer itself, so that nothing is forgotten: optimizer, casts, caches."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from trainer.backends import TrainingBackend
from trainer.batches import Collator, Rows
from trainer.failure import is_out_of_memory
from trainer.memory import Memory
from trainer.micro_batch import Probe, Shape, fitted
from trainer.spec import JobSpec
from trainer.training_loop import RecipeTrainer, training_arguments

PROBE_STEPS = 3
"""Of one micro-batch each. The first may compile, and counts for memory alone."""


class ShapeProber:
    """Trains a few micro-batches of the longest rows, and puts the adapter back."""

    def __init__(
        self,
        backend: TrainingBackend,
        model: Any,
        spec: JobSpec,
        rows: Rows,
        base: Path,
        memory: Memory,
        *,
        on_gpu: bool,
    ) -> None:
        self._backend = backend
        self._model = model
        self._spec = spec
        self._rows = rows
        self._base = base
        self._memory = memory
        self._on_gpu = on_gpu

    def __call__(self, shape: Shape) -> Probe | None:
        self._memory.release()
        self._memory.reset_peak()
        adapter = {
            name: parameter.detach().to("cpu", copy=True)
            for name, parameter in self._model.named_parameters()
            if parameter.requires_grad
        }
        self._backend.set_checkpointing(self._model, shape.checkpointing)
        try:
            step_s = self._train(shape)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            return None
        finally:
            with torch.no_grad():
                for name, parameter in self._model.named_parameters():
                    if parameter.requires_grad:
                        parameter.copy_(adapter[name])
            self._model.zero_grad(set_to_none=True)
            self._memory.release()
        return Probe(self._memory.peak_bytes(), shape.micro_batch_size / step_s)

    def _train(self, shape: Shape) -> float:
        """Returns how long a step takes."""
        hyperparameters, _ = fitted(self._spec.hyperparameters, shape)
        spec = self._spec.model_copy(
            update={
                "hyperparameters": hyperparameters.model_copy(
                    update=dict(gradient_accumulation=1, learning_rate=0.0, weight_decay=0.0)
                )
            }
        )
        count = min(shape.micro_batch_size, len(self._rows.train))
        longest = self._rows.longest(count)
        repeated = longest.select(
            [at % count for at in range(shape.micro_batch_size)] * PROBE_STEPS
        )
        stopwatch = Stopwatch(self._on_gpu)
        collator = Collator(self._base)
        with tempfile.TemporaryDirectory() as scratch:
            arguments = training_arguments(
                spec, Path(scratch), steps=PROBE_STEPS, evaluates=False, on_gpu=self._on_gpu
            )
            arguments.save_strategy = "no"
            trainer = RecipeTrainer(
                self._model, arguments, collator, repeated, None, collator, lambda: False
            )
            trainer.add_callback(stopwatch)
            try:
                trainer.train()
            finally:
                # Else the next trainer wraps the wrapped model.
                trainer.accelerator.unwrap_model(self._model, keep_fp32_wrapper=False)
                trainer.accelerator.free_memory()
        return min(stopwatch.steps_s[1:])


class Stopwatch(TrainerCallback):  # type: ignore[misc]
    """Times steps."""

    def __init__(self, on_gpu: bool) -> None:
        self._on_gpu = on_gpu
        self._began_s = 0.0
        self.steps_s: list[float] = []

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any
    ) -> None:
        self._began_s = self._now_s()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any
    ) -> None:
        self.steps_s.append(self._now_s() - self._began_s)

    def _now_s(self) -> float:
        if self._on_gpu:
            torch.cuda.synchronize()
        return time.monotonic()
