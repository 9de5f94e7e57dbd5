"""What happens in a run, as the training process writes it down and as the store keeps it.

The contract (`training.proto`) has the meaning and the unit of each field.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping

from pydantic import BaseModel, ConfigDict

from store.job_records import EventKind


class Payload(BaseModel):
    """Base of all payloads. What a newer release wrote of an event is read all the same."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=True)


class FailureReason(enum.Enum):
    """Why a job failed; values are names of the contract's `ErrorReason`."""

    DATASET_INVALID = "DATASET_INVALID"
    INIT_FROM_UNUSABLE = "INIT_FROM_UNUSABLE"
    LOSS_DIVERGED = "LOSS_DIVERGED"
    OUT_OF_MEMORY = "OUT_OF_MEMORY"
    STORAGE_FULL = "STORAGE_FULL"
    TRAINING_UNAVAILABLE = "TRAINING_UNAVAILABLE"
    UNSERVABLE_ADAPTER = "UNSERVABLE_ADAPTER"
    TRAINER_LOST = "TRAINER_LOST"
    TRAINER_FAILED = "TRAINER_FAILED"


class JobFailure(Payload):
    """Why a job failed, and what to do."""

    reason: FailureReason
    message: str
    metadata: Mapping[str, str] = {}
    retryable: bool = False
    """Whether another attempt may do better: nothing that was asked for is at fault."""
    summary: str = ""
    """What happened, in a few words that follow a name; empty: the message says it."""


MEASURED = ("loss", "eval_loss", "learning_rate", "grad_norm")


class Progress(Payload):
    """Where a run stands after a step, or after an evaluation (`eval_loss` is set)."""

    step: int
    total_steps: int
    epoch: float
    tokens_seen: int
    trained_tokens: int
    tokens_per_second: float
    loss: float | None = None
    eval_loss: float | None = None
    learning_rate: float | None = None
    grad_norm: float | None = None
    memory_bytes: int = 0
    memory_peak_bytes: int = 0
    eta_s: float = 0.0
    elapsed_s: float = 0.0

    def after(self, before: Progress | None) -> Progress:
        """The same with what was measured last before, of what it does not tell: a step has no
        eval loss and an evaluation nothing else."""
        if before is None:
            return self
        told = {name: getattr(before, name) for name in MEASURED if getattr(self, name) is None}
        return self.model_copy(update=told)


class Checkpoint(Payload):
    """A state of a run that was saved."""

    step: int
    folder: str
    """Below the job's folder."""
    size_bytes: int
    sha256: str
    """Of its manifest."""
    eval_loss: float | None = None
    create_time_ns: int
    final: bool = False
    attempt: int = 0
    """That saved it; 0: a release that did not say."""
    progress: Progress | None = None
    """Where the run stood."""


class Notice(Payload):
    """Something that was changed, or is to be known."""

    code: str
    message: str


class PublicationState(enum.Enum):
    """What became of a trained adapter."""

    NOT_REQUESTED = "not_requested"
    PENDING = "pending"
    GATING = "gating"
    REJECTED = "rejected"
    SERVING = "serving"
    FAILED = "failed"


class GateReport(Payload):
    """What the gate measured in the engine; losses and differences in nats a token."""

    rows: int
    tokens: int
    logprob_delta_mean: float
    logprob_delta_max: float
    eval_loss: float
    base_eval_loss: float
    effect_mean: float
    trained_effect_mean: float | None = None
    effect_ratio: float | None = None
    limits: Mapping[str, float] = {}
    """Those of `trainer.spec.GateSpec` that were applied."""
    trained_as: str = ""
    served_as: str = ""


class Publication(Payload):
    """What became of a trained adapter."""

    state: PublicationState
    adapter: str
    version: int = 0
    reasons: tuple[str, ...] = ()
    gate: GateReport | None = None
    traffic_percent: int = 0


class Manifest(Payload):
    """Where an adapter comes from. Digests are lower-case hex SHA-256."""

    sha256: str = ""
    """Of the manifest's file, so empty in that file."""
    dataset_sha256: str
    rows_sha256: str
    base_model: str
    fingerprints: Mapping[str, str]
    """Of the base model, by the contract's field names."""
    versions: Mapping[str, str]
    seed: int
    device: str
    files: Mapping[str, str]
    """Of the adapter's folder: SHA-256 by name."""
    final_loss: float
    effective_spec: Mapping[str, object]
    checkpoint: Checkpoint
    """The run's result."""


class WorkerEvent(BaseModel):
    """One line of a training process's event file."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    sequence: int
    """Of the attempt, from 1 up without a gap."""
    time_ns: int
    kind: WorkerEventKind
    payload: Mapping[str, object]


class WorkerEventKind(enum.Enum):
    """What a line of an event file tells."""

    LOADED = "loaded"
    """The model is loaded and the first step begins; the payload is the effective JobSpec."""
    PROGRESS = "progress"
    CHECKPOINT = "checkpoint"
    NOTICE = "notice"

    @property
    def kept_as(self) -> EventKind | None:
        """The event of the job that it becomes; None: it changes the state alone."""
        return None if self is WorkerEventKind.LOADED else EventKind(self.value)


WorkerEvent.model_rebuild()
