"""One error of each kind, by the reason that it must get."""

from __future__ import annotations

from engine.errors import (
    AdapterInvalid,
    AdapterLoadFailed,
    AdapterNotChecked,
    AdapterNotFound,
    AdapterNotReady,
    AdapterQuarantined,
    ChatTemplateMissing,
    ChatTemplateRefused,
    CoreFailed,
    EngineError,
    GenerationFailed,
    InvalidRequest,
    InvalidStructuredOutput,
    ModelNotFound,
    PoisonRequest,
    ProbeFailed,
    PromptMissing,
    PromptTooLong,
    ShardUnavailable,
    SlotsUsedUp,
    TrialFailed,
    VersionNotFound,
    Violation,
)
from engine.ring import ShardLent
from gateway.admission import Draining, Overloaded
from gateway.exceptions import (
    ControlPlaneUnavailable,
    DefaultDeadlineExceeded,
    LastOpenShard,
    LoopbackOnly,
    MalformedMessage,
    RequestNotFound,
    SequenceUnknown,
    ShardUnknown,
)
from store.job_records import (
    DatasetExists,
    DatasetInUse,
    DatasetUnknown,
    Intent,
    JobActive,
    JobChanged,
    JobExists,
    JobRecord,
    JobState,
    JobStoreError,
    JobTransitionRefused,
    JobUnknown,
    QueueFull,
)
from store.records import (
    AdapterUnknown,
    EtagMismatch,
    InvalidName,
    NothingToRollBack,
    RegistryError,
    RegistryUnusable,
    RequestIdReused,
    TransitionRefused,
    VersionInUse,
    VersionNotReady,
    VersionRecord,
    VersionState,
    VersionUnknown,
)
from store.sources import SourceNotAllowed
from store.upload_folder import DatabaseFull
from store.uploads import (
    ChecksumMismatch,
    StorageFull,
    UploadBusy,
    UploadIdReused,
    UploadIncomplete,
    UploadOffsetMismatch,
    UploadTooLong,
    UploadUnknown,
)
from trainer.errors import (
    BaseModelUnknown,
    CheckpointUnknown,
    DatasetInvalid,
    GateRejected,
    InitFromUnusable,
    InvalidSpec,
    JobNotPausable,
    JobNotResumable,
    TrainingError,
    TrainingUnavailable,
    UnservableAdapter,
)
from trainer.events import Publication, PublicationState
from trainer.publisher import Finding
from trainer.report import DatasetReport

BAD = Violation("sampling.top_p", "must be in (0, 1], is 0")
LONG = Violation("prompt", "has 600 tokens")
SECRET = "the password is swordfish"


VALIDATING = VersionRecord(
    *("default", "alpha", 2, VersionState.VALIDATING, 7, "/adapters/alpha", "", {}, {}, True, 1, 1)
)

JOB = JobRecord(
    tenant="default",
    name="alpha-1",
    uid="u1",
    number=1,
    adapter="alpha",
    dataset="faq",
    eval_dataset="",
    spec={},
    effective_spec={},
    fingerprints={},
    labels={},
    priority=0,
    state=JobState.RUNNING,
    intent=Intent.RUN,
    epoch=1,
    attempt=1,
    device="cpu",
    ingested_bytes=0,
    last_sequence=1,
    publication={},
    progress=None,
    manifest=None,
    error=None,
    notices=(),
    recovery={},
    create_time_ns=1,
    queue_time_ns=None,
    device_time_ns=None,
    start_time_ns=None,
    end_time_ns=None,
)

SAMPLES: dict[str, list[Exception]] = {
    "MALFORMED_MESSAGE": [MalformedMessage("lora_gateway.v1.GenerateRequest")],
    "INVALID_FIELD": [
        *(InvalidRequest(BAD), InvalidRequest(BAD, LONG), UploadTooLong("night-1", 1000)),
        InvalidSpec(Finding("spec.data.max_row_tokens", "must be at most 2048")),
    ],
    "PROMPT_MISSING": [PromptMissing(Violation("prompt", "is required"))],
    "PROMPT_TOO_LONG": [
        PromptTooLong(LONG, metadata={"max_model_len": "512", "prompt_tokens": "600"}),
        PromptTooLong(LONG, metadata={"max_model_len": "512"}),
    ],
    "INVALID_STRUCTURED_OUTPUT": [InvalidStructuredOutput(BAD)],
    "CHAT_TEMPLATE_MISSING": [ChatTemplateMissing("tiny")],
    "CHAT_TEMPLATE_REFUSED": [ChatTemplateRefused(Violation("chat.messages", "two in a row"))],
    "ADAPTER_NOT_FOUND": [AdapterNotFound("alpa", ["alpha"]), AdapterUnknown("alpa")],
    "VERSION_NOT_FOUND": [VersionNotFound("alpha", 9, [1, 3]), VersionUnknown("alpha", 9)],
    "ADAPTER_INVALID": [
        AdapterInvalid("alpha", ["no weights", "rank 512"]),
        AdapterInvalid("alpha", ["no weights"], 2),
        *(kind("alpha", ["why"], 2) for kind in (AdapterNotChecked, ProbeFailed, TrialFailed)),
    ],
    "ADAPTER_NOT_READY": [
        AdapterNotReady("alpha", [1]),
        VersionNotReady("alpha", 2, VersionState.VALIDATING),
        TransitionRefused(VALIDATING, VersionState.DRAINING),
    ],
    "POISON_REQUEST": [PoisonRequest(2**64 - 1, 1_800_000_000.0)],
    "ADAPTER_QUARANTINED": [AdapterQuarantined("alpha", 2, 1_800_000_000.0, 3600.0)],
    "ADAPTER_LOAD_FAILED": [AdapterLoadFailed("alpha", 2, "its files are gone")],
    "ETAG_MISMATCH": [EtagMismatch("alpha", "t3")],
    "REQUEST_ID_REUSED": [RequestIdReused("nightly"), UploadIdReused("night-1")],
    "SOURCE_NOT_ALLOWED": [SourceNotAllowed("/etc")],
    "VERSION_IN_USE": [VersionInUse("alpha", 2)],
    "NOTHING_TO_ROLL_BACK": [NothingToRollBack("alpha", "it has no earlier split")],
    "OVERLOADED": [Overloaded(7)],
    "DRAINING": [Draining()],
    "SHARD_UNAVAILABLE": [ShardUnavailable("shard-0")],
    "SHARD_LENT": [ShardLent("shard-0")],
    "DEADLINE_EXCEEDED": [DefaultDeadlineExceeded(30.0)],
    "CONTROL_PLANE_UNAVAILABLE": [ControlPlaneUnavailable()],
    "STORAGE_FULL": [StorageFull("the disk is full; go on later"), DatabaseFull("it is full")],
    "UPLOAD_NOT_FOUND": [UploadUnknown("night-1")],
    "UPLOAD_OFFSET_MISMATCH": [UploadOffsetMismatch("night-1", 512), UploadBusy("night-1")],
    "CHECKSUM_MISMATCH": [ChecksumMismatch("0" * 64, "f" * 64)],
    "UPLOAD_INCOMPLETE": [UploadIncomplete("night-1", 512)],
    "REQUEST_NOT_FOUND": [RequestNotFound("r-1")],
    "SEQUENCE_UNKNOWN": [SequenceUnknown(42)],
    "SHARD_NOT_FOUND": [ShardUnknown("shard-9", ["shard-0", "shard-1"])],
    "LAST_OPEN_SHARD": [LastOpenShard("shard-0")],
    "LOOPBACK_ONLY": [LoopbackOnly("lora_gateway.v1.Admin")],
    "DATASET_NOT_FOUND": [DatasetUnknown("faq")],
    "DATASET_EXISTS": [DatasetExists("faq")],
    "DATASET_INVALID": [
        DatasetInvalid(
            "faq",
            DatasetReport(valid=False, reasons=("6 of 9 are bad",), total_lines=9, bad_lines=6),
        )
    ],
    "DATASET_IN_USE": [DatasetInUse("faq", "alpha-1")],
    "JOB_NOT_FOUND": [JobUnknown("alpha-1")],
    "JOB_EXISTS": [JobExists("alpha-1")],
    "JOB_ACTIVE": [JobActive("alpha-1", JobState.RUNNING)],
    "JOB_NOT_PAUSABLE": [JobNotPausable("alpha-1", JobState.FINALIZING)],
    "JOB_NOT_RESUMABLE": [JobNotResumable("alpha-1", JobState.FAILED)],
    "UNSERVABLE_ADAPTER": [
        UnservableAdapter([Finding("spec.lora.r", "must be at most 32")] * 20),
    ],
    "BASE_MODEL_UNKNOWN": [BaseModelUnknown("other", "tiny")],
    "TRAINING_UNAVAILABLE": [TrainingUnavailable("no device trains here")],
    "QUEUE_FULL": [QueueFull(1000)],
    "CHECKPOINT_NOT_FOUND": [CheckpointUnknown("alpha-1", 7)],
    "INIT_FROM_UNUSABLE": [InitFromUnusable("alpha@3", "is damaged: name another one")],
    "GATE_REJECTED": [
        GateRejected(
            *("alpha-1", 7),
            Publication(
                state=PublicationState.REJECTED, adapter="alpha", reasons=("changes nothing",)
            ),
        )
    ],
    "INTERNAL": [
        *(TrainingError(SECRET), JobStoreError(SECRET), JobChanged("alpha-1", 3)),
        JobTransitionRefused(JOB, JobState.QUEUED),
        *(RegistryError(SECRET), RegistryUnusable(SECRET), InvalidName("tenant", SECRET)),
        *(EngineError(SECRET), ModelNotFound(SECRET), CoreFailed(SECRET), SlotsUsedUp(SECRET)),
        *(GenerationFailed(SECRET), RuntimeError(SECRET), KeyError(SECRET), TimeoutError(SECRET)),
    ],
}
"""Errors by the reason that they must get."""
