"""The recipe: load, fit, train, save. One run, in a process of its own.

Imported after the backend, which imports Unsloth, which comes before transformers.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from trainer import checkpoint
from trainer.adapter_files import save_adapter
from trainer.backends import LoadRequest, TrainingBackend
from trainer.batches import COLUMNS, Collator, Rows, load_rows
from trainer.capabilities import installed
from trainer.checkpoint import CheckpointManifest
from trainer.checkpoint_timer import CheckpointTimer
from trainer.checkpointing import CheckpointFinisher, Stopper
from trainer.compute import computes_in_bfloat16, device_name
from trainer.devices import CPU
from trainer.effective import effective_spec
from trainer.event_writer import EventWriter
from trainer.events import Checkpoint, FailureReason, JobFailure, Manifest, Notice
from trainer.failure import RunFailed, out_of_memory
from trainer.fence import Fence
from trainer.initial_weights import begin_with
from trainer.life import Life
from trainer.memory import Memory, memory_of
from trainer.micro_batch import fit, fitted
from trainer.micro_batch_probe import ShapeProber
from trainer.owed_evaluation import Evaluations, NoStepLeft, OwedEvaluation
from trainer.progress import ProgressTeller
from trainer.reference import MAX_ROWS
from trainer.reference_scoring import Scorer
from trainer.run_folder import ADAPTER_FOLDER, REFERENCE_FILE, RunFolder, RunPlan, write_whole
from trainer.steps import an_epoch, steps_of
from trainer.training_loop import RecipeTrainer, autocast, training_arguments

REFERENCE_CANDIDATES = 4 * MAX_ROWS
"""Rows that are looked at for those to score: few have nothing to score."""


class Recipe:
    """One run of a plan."""

    def __init__(
        self,
        plan: RunPlan,
        run: RunFolder,
        backend: TrainingBackend,
        life: Life,
        fence: Fence,
        events: EventWriter,
    ) -> None:
        self._plan = plan
        self._run = run
        self._backend = backend
        self._life = life
        self._fence = fence
        self._events = events
        self._on_gpu = plan.device != CPU
        self._base = Path(plan.model_path)
        self.spec = plan.spec
        """As far as it is known what is really done."""

    def train(self) -> Manifest | None:
        """Where the adapter comes from; None: it was asked to end.

        Raises RunFailed, and whatever libraries raise; what is unfinished on disk is removed.
        """
        try:
            return self._train()
        finally:
            checkpoint.remove_unfinished(self._run)

    def _train(self) -> Manifest | None:
        self.spec, notices = effective_spec(
            self.spec, on_gpu=self._on_gpu, bfloat16=computes_in_bfloat16(on_gpu=self._on_gpu)
        )
        self._tell(*notices)
        memory = memory_of(on_gpu=self._on_gpu, limit_bytes=self._plan.memory_bytes)
        resumed = self._resumed()
        rows = self._rows()
        done = resumed is not None and resumed.step >= self._steps(rows)
        if resumed is not None and done and not resumed.evaluation_owed:
            return self._adopted(rows, resumed)
        model = self._backend.load(
            LoadRequest(spec=self.spec, model_path=self._plan.model_path, on_gpu=self._on_gpu)
        )
        if self.spec.hyperparameters.fit_micro_batch:
            self._fit(model, rows, memory)
        if self.spec.init_from is not None and resumed is None:
            begin_with(model, Path(self._plan.initial_weights), self.spec.init_from)
        return self._loop(model, rows, memory, resumed)

    def _resumed(self) -> CheckpointManifest | None:
        """Of the checkpoint that is gone on from; None: the run begins at the first step."""
        if not self._plan.resume:
            return None
        try:
            return checkpoint.verify(Path(self._plan.resume))
        except checkpoint.CheckpointCorrupt as error:
            raise RunFailed(
                JobFailure(
                    reason=FailureReason.TRAINER_LOST,
                    message=f"the run cannot go on from its checkpoint: {error}",
                    metadata={"attempt": str(self._plan.attempt)},
                    retryable=True,
                    summary="found its checkpoint damaged",
                )
            ) from error

    def _adopted(self, rows: Rows, resumed: CheckpointManifest) -> Manifest:
        """The result of an attempt that died between its last step and saying so."""
        self._begin()
        folder = checkpoint.adopt(self._run, Path(self._plan.resume))
        saved = checkpoint.as_checkpoint(folder, resumed, self._plan.attempt, final=True)
        self._events.checkpoint(saved)
        return self._manifest(rows, saved, resumed.adapter_files)

    def _steps(self, rows: Rows) -> int:
        return steps_of(self.spec, len(rows.train))

    def _rows(self) -> Rows:
        data, seed = self.spec.data, self.spec.hyperparameters.seed
        assert data.eval_fraction is not None and seed is not None
        rows = load_rows(
            Path(self._plan.rows),
            Path(self._plan.eval_rows) if self._plan.eval_rows else None,
            eval_fraction=data.eval_fraction,
            seed=seed,
            cache=self._run.rows,
        )
        if not len(rows.train):
            raise RunFailed(
                JobFailure(
                    reason=FailureReason.DATASET_INVALID,
                    message="no row is left to train on: lower data.eval_fraction, or add rows",
                )
            )
        return rows

    def _fit(self, model: Any, rows: Rows, memory: Memory) -> None:
        if not memory.limit_bytes:  # on a CPU, where trying for all of it would starve serving
            self._tell(
                Notice(
                    code="MICRO_BATCH_NOT_FITTED",
                    message="fit_micro_batch tries out a GPU's memory, and a CPU's is shared with "
                    "serving: rows at once stay as asked for",
                )
            )
            return
        probe = ShapeProber(
            self._backend, model, self.spec, rows, self._base, memory, on_gpu=self._on_gpu
        )
        asked = self.spec.hyperparameters
        shape = fit(asked, memory.limit_bytes, memory.used_bytes(), probe)
        if shape is None:
            one = asked.model_copy(update={"micro_batch_size": 1})  # which was tried last
            tried = self.spec.model_copy(update={"hyperparameters": one})
            raise RunFailed(out_of_memory(tried, memory.limit_bytes))
        self._backend.set_checkpointing(model, shape.checkpointing)
        memory.reset_peak()
        changed, notices = fitted(asked, shape)
        self.spec = self.spec.model_copy(update={"hyperparameters": changed})
        self._tell(*notices)

    def _loop(
        self, model: Any, rows: Rows, memory: Memory, resumed: CheckpointManifest | None
    ) -> Manifest | None:
        collator = Collator(self._base)
        stands = None if resumed is None else resumed.progress
        progress = ProgressTeller(self._events, collator.made, memory, self._begin, stands)
        stopper = Stopper(self._run, self._life)
        epoch_steps = an_epoch(self.spec, len(rows.train))
        evaluates = rows.held_out is not None
        evaluations = Evaluations(epoch_steps if evaluates else None, resumed)
        assert self.spec.checkpoints_kept and self.spec.checkpoint_interval_s
        finisher = CheckpointFinisher(
            self._run,
            self._plan.attempt,
            self.spec.checkpoints_kept,
            self._events,
            progress,
            stopper,
            self._life,
            self._fence,
            functools.partial(self._add_files, self._scorer(rows)),
            evaluations.owed,
        )
        trainer = RecipeTrainer(
            model,
            training_arguments(
                self.spec,
                self._run.checkpoints,
                steps=self._steps(rows),
                evaluates=evaluates,
                on_gpu=self._on_gpu,
            ),
            collator,
            rows.train,
            rows.held_out,
            Collator(self._base),
            lambda: stopper.stopped,
        )
        timer = CheckpointTimer(self._run, self.spec.checkpoint_interval_s, epoch_steps)
        # In this order: a step is told before it is saved, and timing includes saving.
        for callback in (stopper, evaluations, finisher, progress, timer):
            trainer.add_callback(callback)
        if resumed is not None and resumed.evaluation_owed:
            trainer.add_callback(OwedEvaluation(trainer, stopper))
        with contextlib.suppress(NoStepLeft):
            trainer.train(resume_from_checkpoint=self._plan.resume or None)
        if stopper.stopped:
            return None
        assert finisher.newest is not None
        return self._manifest(rows, finisher.newest, finisher.adapter_files)

    def _begin(self) -> None:
        """The first step begins."""
        self._events.loaded(self.spec)
        self._life.loaded()

    def _scorer(self, rows: Rows) -> Scorer:
        source = rows.train if rows.held_out is None else rows.held_out
        asked = self.spec.hyperparameters
        assert asked.quantization and asked.precision
        return Scorer(
            source.select(range(min(len(source), REFERENCE_CANDIDATES))),
            held_out=rows.held_out is not None,
            trained_as=f"{asked.quantization.value}/{asked.precision.value}",
            autocast=functools.partial(autocast, self.spec, on_gpu=self._on_gpu),
        )

    def _add_files(self, scorer: Scorer, folder: Path, model: Any) -> None:
        save_adapter(
            model,
            folder / ADAPTER_FOLDER,
            self.spec,
            self._base,
            getattr(torch, self._plan.served_dtype),
        )
        # What is drawn at random is saved already, and is not to depend on when that was.
        with torch.random.fork_rng():
            reference = scorer.score(model, self._hurried)
        write_whole(folder / REFERENCE_FILE, reference)

    def _hurried(self) -> bool:
        self._life.gets_on()  # asked for after each row
        return self._life.stop_requested

    def _manifest(self, rows: Rows, saved: Checkpoint, files: Mapping[str, str]) -> Manifest:
        plan, stands = self._plan, saved.progress
        assert self.spec.hyperparameters.seed is not None
        return Manifest(
            dataset_sha256=plan.dataset_sha256,
            rows_sha256=rows_sha256(rows),
            base_model=self.spec.base_model,
            fingerprints=plan.fingerprints,
            versions=installed().versions,
            seed=self.spec.hyperparameters.seed,
            device=device_name(on_gpu=self._on_gpu),
            files=files,
            final_loss=math.nan if stands is None or stands.loss is None else stands.loss,
            effective_spec=self.spec.model_dump(mode="json"),
            checkpoint=saved,
        )

    def _tell(self, *notices: Notice) -> None:
        for notice in notices:
            self._events.notice(notice)


def rows_sha256(rows: Rows) -> str:
    """Of what is trained on: lengths, token ids and labels, row by row."""
    digest = hashlib.sha256()
    for table in rows.train.with_format("arrow").iter(batch_size=1000):
        for name in COLUMNS:
            column = table.column(name).combine_chunks()
            for values in (column.value_lengths(), column.flatten()):
                digest.update(values.cast(pa.int32()).to_numpy().tobytes())
    return digest.hexdigest()
