"""Makes a trainer's checkpoints servable and whole, and ends a run that was asked to end."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from trainer import checkpoint as files
from trainer.event_writer import EventWriter
from trainer.events import Checkpoint
from trainer.fence import Fence
from trainer.life import Life
from trainer.progress import ProgressTeller
from trainer.random_states import RandomStates
from trainer.run_folder import RunFolder


class Stopper(TrainerCallback):  # type: ignore[misc]
    """Ends a run after the micro-batch in which it was asked to, also in an evaluation.

    What the trainer does after the last step of an epoch it also does here, so an evaluation
    would come first, which nobody waits for. So this callback comes after the trainer's own.

    Stopped within a step, what was drawn for it is drawn again by who goes on. Stopped before it
    has done one, there is nothing to save: the next goes on from where this one did.
    """

    def __init__(self, run: RunFolder, life: Life) -> None:
        self._run = run
        self._life = life
        self.stopped = False
        """Whether it ended the run."""
        self._after_step: RandomStates | None = None
        self._begun_at = 0
        """The step."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any
    ) -> None:
        self._begun_at = state.global_step

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any
    ) -> None:
        self._heed(state, control)
        if self.stopped and self._after_step is not None:
            self._after_step.restore()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any
    ) -> None:
        self._after_step = RandomStates.now()
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
        self._life.gets_on()
        if not self._life.stop_requested:
            return
        self.stopped = True
        control.should_training_stop = True
        control.should_evaluate = False
        saved = files.is_sealed(files.folder_of(self._run, state.global_step))
        learned = state.global_step > self._begun_at
        control.should_save = self._life.save_requested and learned and not saved


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
        life: Life,
        fence: Fence,
        add_files: Callable[[Path, Any], None],
        owed: Callable[[TrainerState], bool] = lambda state: False,
    ) -> None:
        """`add_files` writes into the checkpoint's folder what is known of the model; `owed` says
        whether what it has learned is still to be measured."""
        self._run = run
        self._attempt = attempt
        self._kept = kept
        self._events = events
        self._progress = progress
        self._stopper = stopper
        self._life = life
        self._fence = fence
        self._add_files = add_files
        self._owed = owed
        self.newest: Checkpoint | None = None
        self.adapter_files: Mapping[str, str] = {}
        """Of the newest: SHA-256 by name."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any
    ) -> None:
        # A state that is gone on from says what the attempt before computed at once.
        state.train_batch_size = args.train_batch_size

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any,
        **kw: Any,
    ) -> None:
        self._life.gets_on()
        stands = self._progress.stands
        folder = files.folder_of(self._run, state.global_step)
        self._add_files(folder, model)
        self._fence.check()
        eval_loss = None if stands is None else stands.eval_loss
        manifest = files.seal(
            folder, state.global_step, eval_loss, stands, evaluation_owed=self._owed(state)
        )
        final = state.global_step >= state.max_steps and not self._stopper.stopped
        self.newest = files.as_checkpoint(folder, manifest, self._attempt, final=final)
        self.adapter_files = manifest.adapter_files
        self._events.checkpoint(self.newest)
        files.drop_oldest(self._run, self._kept)
        files.drop_earlier(self._run, self._attempt, self._kept)
        self._life.gets_on()
