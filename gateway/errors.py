"""Exceptions to statuses: one table, and the only one.

Codes and reasons are the contract of `errors.proto`. Every status carries one ErrorInfo and
what else its code asks for (AIP-193); a bug answers with a fixed text and an id, never with
the exception's own words.
"""

from __future__ import annotations

from collections.abc import Callable

from google.protobuf import any_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2

from engine.errors import (
    AdapterInvalid,
    AdapterLoadFailed,
    AdapterNotFound,
    AdapterNotReady,
    AdapterQuarantined,
    ChatTemplateMissing,
    ChatTemplateRefused,
    InvalidRequest,
    InvalidStructuredOutput,
    PoisonRequest,
    PromptMissing,
    PromptTooLong,
    ShardUnavailable,
    VersionNotFound,
)
from engine.ring import ShardLent
from gateway import answers
from gateway.admission import Draining, Overloaded
from gateway.call import Call
from gateway.exceptions import (
    ControlPlaneUnavailable,
    DefaultDeadlineExceeded,
    LastOpenShard,
    LoopbackOnly,
    MalformedMessage,
    Relayed,
    RequestNotFound,
    SequenceUnknown,
    ShardUnknown,
)
from lora_gateway.v1.errors_pb2 import ErrorReason
from store.job_records import (
    DatasetExists,
    DatasetInUse,
    DatasetUnknown,
    JobActive,
    JobExists,
    JobUnknown,
    QueueFull,
)
from store.records import (
    AdapterUnknown,
    EtagMismatch,
    NothingToRollBack,
    RequestIdReused,
    TransitionRefused,
    VersionInUse,
    VersionNotReady,
    VersionUnknown,
)
from store.sources import SourceNotAllowed
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
    TrainingUnavailable,
    UnservableAdapter,
)

DOMAIN = "lora-gateway"
MAX_MESSAGE_BYTES = 1024
"""It travels twice, once with each byte as three; clients refuse trailers of over 8 KiB."""


def status_of(error: BaseException, call: Call) -> status_pb2.Status:
    """The status that tells `error` to the caller of `call`."""
    if isinstance(error, Relayed):
        return error.status
    answer = answers.internal(error, call)
    for kind, build in _TABLE:
        if isinstance(error, kind):
            answer = build(error, call)
            break
    info = error_details_pb2.ErrorInfo(
        reason=ErrorReason.Name(answer.reason).removeprefix("ERROR_REASON_"),  # type: ignore[arg-type]
        domain=DOMAIN,
        metadata=answer.metadata,
    )
    message = (answer.message or str(error)).encode()[:MAX_MESSAGE_BYTES].decode(errors="ignore")
    status = status_pb2.Status(code=answer.code, message=message)
    for detail in (info, *answer.details):
        packed = any_pb2.Any()
        packed.Pack(detail)
        status.details.append(packed)
    return status


_version_missing = answers.missing(
    ErrorReason.ERROR_REASON_VERSION_NOT_FOUND, "adapter version", "adapter", "version"
)
_version_not_ready = answers.says(
    code_pb2.FAILED_PRECONDITION,
    ErrorReason.ERROR_REASON_ADAPTER_NOT_READY,
    *("adapter", "version", "state"),
)

_TABLE: tuple[tuple[type[Exception], Callable[..., answers.Answer]], ...] = (
    # The first match answers, so a subclass stands before its base.
    (MalformedMessage, answers.malformed),
    (PromptMissing, answers.invalid(ErrorReason.ERROR_REASON_PROMPT_MISSING)),
    (PromptTooLong, answers.invalid(ErrorReason.ERROR_REASON_PROMPT_TOO_LONG)),
    (InvalidStructuredOutput, answers.invalid(ErrorReason.ERROR_REASON_INVALID_STRUCTURED_OUTPUT)),
    (ChatTemplateRefused, answers.invalid(ErrorReason.ERROR_REASON_CHAT_TEMPLATE_REFUSED)),
    (PoisonRequest, answers.invalid(ErrorReason.ERROR_REASON_POISON_REQUEST)),
    (InvalidRequest, answers.invalid(ErrorReason.ERROR_REASON_INVALID_FIELD)),
    (ChatTemplateMissing, answers.template_missing),
    (VersionNotFound, _version_missing),
    (VersionUnknown, _version_missing),
    (
        AdapterNotFound,
        answers.missing(ErrorReason.ERROR_REASON_ADAPTER_NOT_FOUND, "adapter", "adapter"),
    ),
    (
        AdapterUnknown,
        answers.missing(ErrorReason.ERROR_REASON_ADAPTER_NOT_FOUND, "adapter", "adapter"),
    ),
    (
        AdapterNotReady,
        answers.says(
            code_pb2.FAILED_PRECONDITION, ErrorReason.ERROR_REASON_ADAPTER_NOT_READY, "adapter"
        ),
    ),
    (VersionNotReady, _version_not_ready),
    (TransitionRefused, _version_not_ready),
    (
        AdapterLoadFailed,
        answers.says(
            code_pb2.FAILED_PRECONDITION,
            ErrorReason.ERROR_REASON_ADAPTER_LOAD_FAILED,
            "adapter",
            "version",
        ),
    ),
    (
        VersionInUse,
        answers.says(
            code_pb2.FAILED_PRECONDITION,
            ErrorReason.ERROR_REASON_VERSION_IN_USE,
            "adapter",
            "version",
        ),
    ),
    (AdapterInvalid, answers.adapter_invalid),
    (
        EtagMismatch,
        answers.says(code_pb2.ABORTED, ErrorReason.ERROR_REASON_ETAG_MISMATCH, "adapter", "etag"),
    ),
    (
        NothingToRollBack,
        answers.says(
            code_pb2.FAILED_PRECONDITION, ErrorReason.ERROR_REASON_NOTHING_TO_ROLL_BACK, "adapter"
        ),
    ),
    (RequestIdReused, answers.id_reused),
    (UploadIdReused, answers.id_reused),
    (
        SourceNotAllowed,
        answers.says(
            code_pb2.PERMISSION_DENIED,
            ErrorReason.ERROR_REASON_SOURCE_NOT_ALLOWED,
            "source_uri=uri",
        ),
    ),
    (
        UploadUnknown,
        answers.missing(ErrorReason.ERROR_REASON_UPLOAD_NOT_FOUND, "upload", "upload_id"),
    ),
    (
        UploadOffsetMismatch,
        answers.says(
            code_pb2.FAILED_PRECONDITION,
            ErrorReason.ERROR_REASON_UPLOAD_OFFSET_MISMATCH,
            "upload_id",
            "offset=expected",
        ),
    ),
    (
        UploadBusy,
        answers.says(
            code_pb2.FAILED_PRECONDITION,
            ErrorReason.ERROR_REASON_UPLOAD_OFFSET_MISMATCH,
            "upload_id",
        ),
    ),
    (
        UploadIncomplete,
        answers.says(
            code_pb2.FAILED_PRECONDITION,
            ErrorReason.ERROR_REASON_UPLOAD_INCOMPLETE,
            "upload_id",
            "offset",
        ),
    ),
    (ChecksumMismatch, answers.checksum_mismatch),
    (UploadTooLong, answers.upload_too_long),
    (StorageFull, answers.says(code_pb2.RESOURCE_EXHAUSTED, ErrorReason.ERROR_REASON_STORAGE_FULL)),
    (InvalidSpec, answers.invalid_spec),
    (DatasetInvalid, answers.dataset_invalid),
    (UnservableAdapter, answers.unservable),
    (
        BaseModelUnknown,
        answers.field_says(
            ErrorReason.ERROR_REASON_BASE_MODEL_UNKNOWN, "spec.base_model", "base_model=served"
        ),
    ),
    (
        TrainingUnavailable,
        answers.says(code_pb2.FAILED_PRECONDITION, ErrorReason.ERROR_REASON_TRAINING_UNAVAILABLE),
    ),
    (
        DatasetUnknown,
        answers.missing(ErrorReason.ERROR_REASON_DATASET_NOT_FOUND, "dataset", "dataset"),
    ),
    (
        DatasetExists,
        answers.exists(ErrorReason.ERROR_REASON_DATASET_EXISTS, "dataset", "dataset"),
    ),
    (
        DatasetInUse,
        answers.says(
            code_pb2.FAILED_PRECONDITION, ErrorReason.ERROR_REASON_DATASET_IN_USE, "dataset", "job"
        ),
    ),
    (JobUnknown, answers.missing(ErrorReason.ERROR_REASON_JOB_NOT_FOUND, "job", "job")),
    (JobExists, answers.exists(ErrorReason.ERROR_REASON_JOB_EXISTS, "job", "job")),
    (
        JobActive,
        answers.says(
            code_pb2.FAILED_PRECONDITION, ErrorReason.ERROR_REASON_JOB_ACTIVE, "job", "state"
        ),
    ),
    (
        JobNotPausable,
        answers.says(
            code_pb2.FAILED_PRECONDITION,
            ErrorReason.ERROR_REASON_JOB_NOT_PAUSABLE,
            *("job", "state"),
        ),
    ),
    (
        JobNotResumable,
        answers.says(
            code_pb2.FAILED_PRECONDITION,
            ErrorReason.ERROR_REASON_JOB_NOT_RESUMABLE,
            *("job", "state"),
        ),
    ),
    (QueueFull, answers.queue_full),
    (
        CheckpointUnknown,
        answers.missing(ErrorReason.ERROR_REASON_CHECKPOINT_NOT_FOUND, "checkpoint", "job", "step"),
    ),
    (
        InitFromUnusable,
        answers.says(
            code_pb2.FAILED_PRECONDITION, ErrorReason.ERROR_REASON_INIT_FROM_UNUSABLE, "init_from"
        ),
    ),
    (GateRejected, answers.gate_rejected),
    (
        RequestNotFound,
        answers.missing(ErrorReason.ERROR_REASON_REQUEST_NOT_FOUND, "request", "request_id"),
    ),
    (
        SequenceUnknown,
        answers.says(
            code_pb2.OUT_OF_RANGE, ErrorReason.ERROR_REASON_SEQUENCE_UNKNOWN, "sequence=newest"
        ),
    ),
    (ShardUnknown, answers.missing(ErrorReason.ERROR_REASON_SHARD_NOT_FOUND, "shard", "shard")),
    (
        LastOpenShard,
        answers.says(
            code_pb2.FAILED_PRECONDITION, ErrorReason.ERROR_REASON_LAST_OPEN_SHARD, "shard"
        ),
    ),
    (
        LoopbackOnly,
        answers.says(code_pb2.PERMISSION_DENIED, ErrorReason.ERROR_REASON_LOOPBACK_ONLY, "service"),
    ),
    (ControlPlaneUnavailable, answers.control_plane),
    (Overloaded, answers.overloaded),
    (Draining, answers.draining),
    (AdapterQuarantined, answers.quarantined),
    (ShardLent, answers.shard_lent),
    (ShardUnavailable, answers.shard_unavailable),
    (DefaultDeadlineExceeded, answers.deadline),
)
"""What is not here is a bug, or an engine-internal failure: INTERNAL."""
