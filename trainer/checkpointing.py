"""Makes a trainer's checkpoints servable and whole, and ends a run that was asked to end."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from trainer import checkpoint as files
from trainer.event_writer import EventWriter
from trainer.events import Checkpoint
from trainer.life import Life
from trainer.progress import ProgressTeller
from trainer.run_folder import MANIFEST_FILE, RunFolder


class Stopper(TrainerCallback):  # type: ignore[misc]
    """Ends a run after the micro-batch in which it was asked to, also in an evaluation.

    What the trainer does after the last step of an epoch it also does here, so an evaluation
    would come first, which nobody waits for. So this callback comes after the trainer's own.
    """

    def __init__(self, run: RunFolder, life: Life) -> None:
        self._run = run
        self._life = life
        self.stopped = False
        """Whether it ended the run."""

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any
    ) -> None:
        self._heed(state, control)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any
    ) -> None:
        self._heed(state, control)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any
    ) -> None:
        self._heed(state, control)

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any
    ) -> None:
        self._heed(state, control)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any
    ) -> None:
        self._heed(state, control)

    def _heed(self, state: TrainerState, control: TrainerControl) -> None:
        if not self._life.stop_requested:
            return
        self.stopped = True
        control.should_training_stop = True
        control.should_evaluate = False
        saved = files.is_sealed(files.folder_of(self._run, state.global_step))
        control.should_save = self._life.save_requested and state.global_step > 0 and not saved


class CheckpointFinisher(TrainerCallback):  # type: ignore[misc]
    """Adds what serving and the gate need to what the trainer saved, and seals it."""

    def __init__(
        self,
        run: RunFolder,
        attempt: int,
        kept: int,
        events: EventWriter,
        progress: ProgressTeller,
        stopper: Stopper,
        add_files: Callable[[Path, Any], None],
    ) -> None:
        """`add_files` writes into the checkpoint's folder what is known of the model."""
        self._run = run
        self._attempt = attempt
        self._kept = kept
        self._events = events
        self._progress = progress
        self._stopper = stopper
        self._add_files = add_files
        self.newest: Checkpoint | None = None
        self.adapter_files: Mapping[str, str] = {}
        """Of the newest: SHA-256 by name."""

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any,
        **kw: Any,
    ) -> None:
        folder = files.folder_of(self._run, state.global_step)
        self._add_files(folder, model)
        manifest = files.seal(folder, state.global_step, self._progress.eval_loss)
        self.newest = Checkpoint(
            step=state.global_step,
            folder=f"attempts/{self._attempt}/{self._run.checkpoints.name}/{folder.name}",
            size_bytes=manifest.size_bytes,
            sha256=files.sha256_of(folder / MANIFEST_FILE),
            eval_loss=manifest.eval_loss,
            create_time_ns=manifest.create_time_ns,
            final=state.global_step >= state.max_steps and not self._stopper.stopped,
        )
        self.adapter_files = manifest.adapter_files
        self._events.checkpoint(self.newest)
        files.drop_oldest(self._run, self._kept)
