"""transformers' Trainer as the recipe uses it."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import torch
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerControl, TrainingArguments

from trainer.adapter_files import WEIGHTS_FILE
from trainer.batches import Collator
from trainer.initial_weights import put_weights
from trainer.rows import IGNORED
from trainer.spec import JobSpec, LearningRateSchedule, Optimizer, Precision

OPTIMIZERS = {Optimizer.ADAMW_8BIT: "adamw_8bit", Optimizer.ADAMW: "adamw_torch_fused"}
SCHEDULES = {
    LearningRateSchedule.COSINE: "cosine",
    LearningRateSchedule.LINEAR: "linear",
    LearningRateSchedule.CONSTANT: "constant_with_warmup",
}


class RecipeTrainer(Trainer):  # type: ignore[misc]
    """Evaluates by tokens and not by batches, and may be stopped in the middle of that."""

    def __init__(
        self,
        model: Any,
        arguments: TrainingArguments,
        collator: Collator,
        rows: datasets.Dataset,
        held_out: datasets.Dataset | None,
        held_out_collator: Collator,
        stopped: Callable[[], bool],
    ) -> None:
        self.control: TrainerControl
        super().__init__(
            model=model,
            args=arguments,
            data_collator=collator,
            train_dataset=rows,
            eval_dataset=held_out,
        )
        self._held_out_collator = held_out_collator
        self._stopped = stopped

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """The adapter as it was trained. The trainer itself would take the copy of it that is
        served, which is in a folder beside it, for a second adapter, and train the first anew."""
        put_weights(self.model, Path(resume_from_checkpoint) / WEIGHTS_FILE)

    def save(self) -> None:
        """Save a checkpoint of the run as it stands, as it does by itself after an epoch."""
        self._save_checkpoint(self.model, None)
        self.control = self.callback_handler.on_save(self.args, self.state, self.control)

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Mean loss of held-out rows in nats a token, so the same for every batch size.

        Stopped by a callback, it measures nothing. It draws nothing at random of what training
        draws, so a run that is stopped before it goes on as one that was not.
        """
        with torch.random.fork_rng():
            return self._evaluate_apart()

    def _evaluate_apart(self) -> dict[str, float]:
        self.model.eval()
        loss, tokens = 0.0, 0
        for batch in DataLoader(
            self.eval_dataset,
            batch_size=self.args.per_device_eval_batch_size,
            collate_fn=self._held_out_collator,
        ):
            self.control = self.callback_handler.on_prediction_step(
                self.args, self.state, self.control
            )
            if self._stopped():
                return {}
            count = int((batch["labels"][:, 1:] != IGNORED).sum())
            mean, _, _ = self.prediction_step(self.model, batch, prediction_loss_only=True)
            loss += float(mean) * count
            tokens += count
        metrics = {"eval_loss": loss / tokens if tokens else math.nan}
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics


def training_arguments(
    spec: JobSpec, output: Path, *, steps: int, evaluates: bool, on_gpu: bool
) -> TrainingArguments:
    """An effective spec as transformers says it."""
    asked = spec.hyperparameters
    assert asked.optimizer and asked.learning_rate_schedule and asked.warmup_ratio is not None
    return TrainingArguments(
        output_dir=str(output),
        max_steps=steps,
        per_device_train_batch_size=asked.micro_batch_size,
        per_device_eval_batch_size=asked.micro_batch_size,
        gradient_accumulation_steps=asked.gradient_accumulation,
        learning_rate=asked.learning_rate,
        lr_scheduler_type=SCHEDULES[asked.learning_rate_schedule],
        warmup_steps=math.ceil(asked.warmup_ratio * steps),
        weight_decay=asked.weight_decay,
        max_grad_norm=asked.max_grad_norm,
        optim=OPTIMIZERS[asked.optimizer],
        seed=asked.seed,
        data_seed=asked.seed,
        bf16=asked.precision is Precision.BFLOAT16,
        fp16=False,
        use_cpu=not on_gpu,
        eval_strategy="epoch" if evaluates else "no",
        save_strategy="epoch",
        # The backend does it: each has its own way.
        gradient_checkpointing=False,
        logging_steps=1,
        # Else a loss that is no number is replaced by the mean of those before.
        logging_nan_inf_filter=False,
        dataloader_num_workers=0,
        dataloader_pin_memory=on_gpu,
        # Rows have the three columns alone that a model takes.
        remove_unused_columns=False,
        report_to="none",
        disable_tqdm=True,
    )


def autocast(spec: JobSpec, *, on_gpu: bool) -> Any:
    """The context in which the trainer runs the model."""
    return torch.autocast(
        "cuda" if on_gpu else "cpu",
        dtype=torch.bfloat16,
        enabled=spec.hyperparameters.precision is Precision.BFLOAT16,
    )
