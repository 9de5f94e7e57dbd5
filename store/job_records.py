"""What the job store keeps of datasets, jobs and their events, and what it refuses.

Specs, progress and the payloads of events are JSON here; `trainer/spec.py` and
`trainer/events.py` give them their types.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple


class JobState(enum.Enum):
    """Where a job stands."""

    VALIDATING = "validating"
    """Its dataset is being read and tokenized."""
    QUEUED = "queued"
    """Waits for a device."""
    PREPARING = "preparing"
    """A training process was started, and loads the base model."""
    RUNNING = "running"
    """Steps run."""
    PAUSING = "pausing"
    """The training process was asked to save and end; the job is to go on later."""
    PAUSED = "paused"
    """Rests without a device until it is resumed."""
    RECOVERING = "recovering"
    """The training process is gone before its time; the job waits for its next attempt."""
    CANCELLING = "cancelling"
    """The training process was asked to end."""
    FINALIZING = "finalizing"
    """The adapter is saved, and is being published."""
    SUCCEEDED = "succeeded"
    CANCELLED = "cancelled"
    FAILED = "failed"

    @property
    def is_final(self) -> bool:
        """Whether nothing comes after it."""
        return not TRANSITIONS[self]


TRANSITIONS: Mapping[JobState, frozenset[JobState]] = {
    JobState.VALIDATING: frozenset({JobState.QUEUED, JobState.CANCELLING, JobState.FAILED}),
    JobState.QUEUED: frozenset(
        {JobState.PREPARING, JobState.PAUSED, JobState.CANCELLING, JobState.FAILED}
    ),
    JobState.PREPARING: frozenset(
        {
            JobState.RUNNING,
            JobState.PAUSING,
            JobState.RECOVERING,
            JobState.CANCELLING,
            JobState.FAILED,
        }
    ),
    JobState.RUNNING: frozenset(
        {
            JobState.FINALIZING,
            JobState.PAUSING,
            JobState.RECOVERING,
            JobState.CANCELLING,
            JobState.FAILED,
        }
    ),
    JobState.PAUSING: frozenset(
        {
            JobState.PAUSED,
            JobState.FINALIZING,  # it was done before it heard
            JobState.RECOVERING,
            JobState.CANCELLING,
            JobState.FAILED,
        }
    ),
    JobState.PAUSED: frozenset({JobState.QUEUED, JobState.CANCELLING}),
    JobState.RECOVERING: frozenset(
        {JobState.QUEUED, JobState.PAUSED, JobState.CANCELLING, JobState.FAILED}
    ),
    JobState.FINALIZING: frozenset({JobState.SUCCEEDED, JobState.CANCELLING, JobState.FAILED}),
    JobState.CANCELLING: frozenset({JobState.CANCELLED}),
    JobState.SUCCEEDED: frozenset(),
    JobState.CANCELLED: frozenset(),
    JobState.FAILED: frozenset(),
}


HAS_PROCESS = frozenset(
    {JobState.PREPARING, JobState.RUNNING, JobState.PAUSING, JobState.CANCELLING}
)
"""States in which a job may have a training process, and a device for it."""


class Intent(enum.Enum):
    """What its owner wants of a job, kept apart from where it stands: it survives a restart."""

    RUN = "run"
    PAUSE = "pause"
    """Save, leave the device, and wait."""
    CANCEL = "cancel"
    """End, and keep the newest checkpoint."""
    DISCARD = "discard"
    """End, and keep no checkpoint."""

    @property
    def ends(self) -> bool:
        """Whether the job is to end before it is done."""
        return self in (Intent.CANCEL, Intent.DISCARD)

    def then(self, wish: Intent) -> Intent:
        """What is wanted once somebody wishes for that: an end is not taken back."""
        return self if self is Intent.DISCARD or (self.ends and not wish.ends) else wish


class EventKind(enum.Enum):
    """What an event of a job tells; the type of its payload is in `trainer/events.py`."""

    STATE_CHANGED = "state_changed"
    PROGRESS = "progress"
    CHECKPOINT = "checkpoint"
    PUBLICATION = "publication"
    NOTICE = "notice"


class JobKey(NamedTuple):
    """Names a job."""

    tenant: str
    job: str


@dataclass(frozen=True, slots=True)
class JobTally:
    """All jobs of all tenants, counted."""

    counts: Mapping[JobState, int]
    """How many there are, of every state."""
    active: Sequence[tuple[str, JobState, int]]
    """Uid, state and attempt of those that have not ended, oldest first."""


@dataclass(frozen=True, slots=True)
class DatasetRecord:
    """One uploaded file. It never changes."""

    tenant: str
    name: str
    sha256: str
    size_bytes: int
    format: str
    """A `trainer.spec.DatasetFormat`; empty: to be detected."""
    create_time_ns: int

    def is_what(self, sha256: str, format: str) -> bool:
        """Whether an upload of these bytes asks for this dataset; an empty format asks for any."""
        return self.sha256 == sha256 and format in ("", self.format)


@dataclass(frozen=True, slots=True)
class NewJob:
    """What a caller asks for. Equal requests have equal fields."""

    tenant: str
    name: str
    """Empty: made from the adapter's name."""
    adapter: str
    dataset: str
    eval_dataset: str
    """Empty: none."""
    spec: Mapping[str, Any]
    """A `trainer.spec.JobSpec` as asked for, unset fields left out."""
    labels: Mapping[str, str] = field(default_factory=dict)
    priority: int = 0


@dataclass(frozen=True, slots=True)
class JobRecord:
    """One job as it stands."""

    tenant: str
    name: str
    uid: str
    """Of this job alone, also when another later has its name; names its folder."""
    number: int
    """Its place among all jobs of all tenants in the order in which they were made; never another
    job's, also when this one is deleted."""
    adapter: str
    dataset: str
    eval_dataset: str
    spec: Mapping[str, Any]
    effective_spec: Mapping[str, Any]
    """The same with every field set."""
    fingerprints: Mapping[str, str]
    """Of the base model that it was made for, by the contract's field names."""
    labels: Mapping[str, str]
    priority: int
    """Higher is earlier; see `trainer/fair_order.py`."""
    state: JobState
    intent: Intent
    epoch: int
    """Counts its transitions; who changes it says which it has seen."""
    attempt: int
    """Of the training process that runs or ran last, from 1; 0: none was started."""
    device: str
    """Which that process has or had; empty: none was started."""
    ingested_bytes: int
    """Of that attempt's event file that are in the store."""
    last_sequence: int
    """Of its newest event; 0: none."""
    publication: Mapping[str, Any]
    """A `trainer.events.Publication`."""
    progress: Mapping[str, Any] | None
    """A `trainer.events.Progress` as of the last step."""
    manifest: Mapping[str, Any] | None
    """A `trainer.events.Manifest` once the adapter is saved."""
    error: Mapping[str, Any] | None
    """A `trainer.events.JobFailure` if it FAILED."""
    notices: Sequence[Mapping[str, Any]]
    """`trainer.events.Notice`s, the first MAX_NOTICES."""
    recovery: Mapping[str, Any]
    """A `trainer.recovery.Recovery`."""
    create_time_ns: int
    queue_time_ns: int | None
    """When it was last QUEUED; None: it never was."""
    device_time_ns: int | None
    """When it was given the device that it has; None: it has none."""
    start_time_ns: int | None
    """When its first training process was started."""
    end_time_ns: int | None

    @property
    def key(self) -> JobKey:
        return JobKey(self.tenant, self.name)


MAX_NOTICES = 64


@dataclass(frozen=True, slots=True)
class NewEvent:
    """An event to be written with a change."""

    kind: EventKind
    payload: Mapping[str, Any]
    time_ns: int | None = None
    """When it happened, in nanoseconds since the epoch; None: now."""


@dataclass(frozen=True, slots=True)
class JobChange:
    """What becomes different; None leaves a field as it is."""

    state: JobState | None = None
    """Also writes a STATE_CHANGED event, before the others."""
    cause: Mapping[str, Any] | None = None
    """A `trainer.events.JobFailure` for that event alone, of a job that goes on all the same."""
    intent: Intent | None = None
    """Unless that takes back an end."""
    effective_spec: Mapping[str, Any] | None = None
    attempt: int | None = None
    """A new attempt; `ingested_bytes` begins at 0 again."""
    device: str | None = None
    ingested_bytes: int | None = None
    publication: Mapping[str, Any] | None = None
    progress: Mapping[str, Any] | None = None
    manifest: Mapping[str, Any] | None = None
    error: Mapping[str, Any] | None = None
    recovery: Mapping[str, Any] | None = None
    notices: Sequence[Mapping[str, Any]] = ()
    """To be added."""
    events: Sequence[NewEvent] = ()


@dataclass(frozen=True, slots=True)
class JobEventRecord:
    """One change of a job, written in the transaction that made it."""

    sequence: int
    """From 1 up within the job, without a gap."""
    time_ns: int
    attempt: int
    kind: EventKind
    payload: Mapping[str, Any]


class JobStoreError(Exception):
    """Base of what the job store refuses. Then nothing was written."""


class DatasetUnknown(JobStoreError, LookupError):
    """There is no dataset of that name."""

    def __init__(self, dataset: str) -> None:
        super().__init__(f"dataset {dataset!r} is unknown; upload it, or list what there is")
        self.dataset = dataset


class DatasetExists(JobStoreError):
    """A dataset of that name has other bytes, or another format."""

    def __init__(self, dataset: str) -> None:
        super().__init__(
            f"dataset {dataset!r} exists with other bytes or as another format; take another name"
        )
        self.dataset = dataset


class DatasetInUse(JobStoreError):
    """A job that has not ended needs the dataset."""

    def __init__(self, dataset: str, job: str) -> None:
        super().__init__(f"dataset {dataset!r} is needed by job {job!r}; cancel it, or wait")
        self.dataset = dataset
        self.job = job


class JobUnknown(JobStoreError, LookupError):
    """There is no job of that name."""

    def __init__(self, job: str) -> None:
        super().__init__(f"job {job!r} is unknown; list what there is")
        self.job = job


class JobExists(JobStoreError):
    """A job of that name exists."""

    def __init__(self, job: str) -> None:
        super().__init__(f"job {job!r} exists; take another job_id")
        self.job = job


class JobActive(JobStoreError):
    """The job has not ended."""

    def __init__(self, job: str, state: JobState) -> None:
        super().__init__(f"job {job!r} is {state.name}, and has to end first; cancel it")
        self.job = job
        self.state = state


class JobChanged(JobStoreError):
    """Somebody else changed the job: it has another epoch, or is gone."""

    def __init__(self, job: str, seen: int) -> None:
        super().__init__(f"job {job!r} changed since epoch {seen}")
        self.job = job


class JobTransitionRefused(JobStoreError):
    """A job cannot go from the state that it is in to the one asked for."""

    def __init__(self, record: JobRecord, state: JobState) -> None:
        super().__init__(f"job {record.name!r} cannot go from {record.state.name} to {state.name}")
        self.job = record.name
        self.state = record.state


class QueueFull(JobStoreError):
    """As many jobs as may have not ended."""

    def __init__(self, limit: int) -> None:
        super().__init__(f"{limit} jobs have not ended, and no more may wait; try again later")
        self.limit = limit
