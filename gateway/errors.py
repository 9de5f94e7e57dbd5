"""Exceptions to statuses: one table, and the only one.

Codes and reasons are the contract of `errors.proto`. Every status carries one ErrorInfo and
what else its code asks for (AIP-193); a bug answers with a fixed text and an id, never with
the exception's own words.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass, field

from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import Message
from google.rpc import code_pb2, error_details_pb2, status_pb2

from engine.errors import (
    AdapterInvalid,
    AdapterLoadFailed,
    AdapterNotFound,
    AdapterNotReady,
    ChatTemplateMissing,
    ChatTemplateRefused,
    InvalidRequest,
    InvalidStructuredOutput,
    PromptMissing,
    PromptTooLong,
    ShardUnavailable,
    VersionNotFound,
    Violation,
)
from gateway.admission import RETRY_DELAY_S, Draining, Overloaded
from gateway.call import Call
from gateway.exceptions import (
    ControlPlaneUnavailable,
    DefaultDeadlineExceeded,
    MalformedMessage,
    Relayed,
    RequestNotFound,
    SequenceUnknown,
)
from lora_gateway.v1.errors_pb2 import ErrorReason
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

DOMAIN = "lora-gateway"
MAX_METADATA_CHARACTERS = 256
MAX_MESSAGE_BYTES = 1024
"""It travels twice, once with each byte as three; clients refuse trailers of over 8 KiB."""
INTERNAL_MESSAGE = "internal error; report the request id to the operator"


@dataclass(frozen=True, slots=True)
class _Answer:
    """Code, reason and details of one kind of error."""

    code: int
    reason: int
    metadata: dict[str, str] = field(default_factory=dict)
    details: tuple[Message, ...] = ()
    message: str = ""
    """Empty: the error's own."""


def status_of(error: BaseException, call: Call) -> status_pb2.Status:
    """The status that tells `error` to the caller of `call`."""
    if isinstance(error, Relayed):
        return error.status
    answer = _internal(error, call)
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


def _invalid(reason: int) -> Callable[[InvalidRequest, Call], _Answer]:
    def build(error: InvalidRequest, call: Call) -> _Answer:
        bad = error_details_pb2.BadRequest(
            field_violations=[
                error_details_pb2.BadRequest.FieldViolation(
                    field=violation.field, description=violation.description
                )
                for violation in error.violations
            ]
        )
        metadata = {"field": error.violations[0].field, **error.metadata}
        return _Answer(code_pb2.INVALID_ARGUMENT, reason, metadata, (bad,))

    return build


def _malformed(error: MalformedMessage, call: Call) -> _Answer:
    metadata = {"message_type": error.message_type}
    return _Answer(code_pb2.INVALID_ARGUMENT, ErrorReason.ERROR_REASON_MALFORMED_MESSAGE, metadata)


def _template_missing(error: ChatTemplateMissing, call: Call) -> _Answer:
    return _Answer(
        code_pb2.FAILED_PRECONDITION,
        ErrorReason.ERROR_REASON_CHAT_TEMPLATE_MISSING,
        {"base_model": error.base_model},
    )


def _says(code: int, reason: int, *attributes: str) -> Callable[[Exception, Call], _Answer]:
    """An answer whose metadata are attributes of the error; `name=attribute` renames one."""

    def build(error: Exception, call: Call) -> _Answer:
        metadata = {}
        for attribute in attributes:
            name, _, source = attribute.partition("=")
            metadata[name] = _text(getattr(error, source or name))
        return _Answer(code, reason, metadata)

    return build


def _text(value: object) -> str:
    """A caller's text among metadata must not make trailers that its gRPC refuses."""
    text = value.name if isinstance(value, enum.Enum) else str(value)
    return text[:MAX_METADATA_CHARACTERS]


def _missing(reason: int, kind: str, *attributes: str) -> Callable[[Exception, Call], _Answer]:
    """NOT_FOUND of a resource, whose name is made of the metadata."""
    says = _says(code_pb2.NOT_FOUND, reason, *attributes)

    def build(error: Exception, call: Call) -> _Answer:
        metadata = says(error, call).metadata
        resource = error_details_pb2.ResourceInfo(
            resource_type=kind, resource_name="@".join(metadata.values())
        )
        return _Answer(code_pb2.NOT_FOUND, reason, metadata, (resource,))

    return build


def _adapter_invalid(error: AdapterInvalid, call: Call) -> _Answer:
    # All findings, as far as the trailers hold them.
    bad = InvalidRequest(*(Violation("source_uri", finding) for finding in error.findings))
    answer = _invalid(ErrorReason.ERROR_REASON_ADAPTER_INVALID)(bad, call)
    metadata = {"adapter": _text(error.adapter)}
    if error.version:
        metadata["version"] = str(error.version)
    first = bad.violations[0].description
    more = f" (and {len(error.findings) - 1} more)" if len(error.findings) > 1 else ""
    message = f"adapter {error.adapter[:64]!r} cannot be served: {first}{more}"
    return _Answer(answer.code, answer.reason, metadata, answer.details, message)


def _id_reused(error: RequestIdReused | UploadIdReused, call: Call) -> _Answer:
    request_id = error.request_id if isinstance(error, RequestIdReused) else error.upload_id
    resource = error_details_pb2.ResourceInfo(resource_type="request", resource_name=request_id)
    return _Answer(
        code_pb2.ALREADY_EXISTS,
        ErrorReason.ERROR_REASON_REQUEST_ID_REUSED,
        {"request_id": request_id},
        (resource,),
    )


def _upload_too_long(error: UploadTooLong, call: Call) -> _Answer:
    bad = InvalidRequest(Violation("chunk", str(error)))
    return _invalid(ErrorReason.ERROR_REASON_INVALID_FIELD)(bad, call)


def _checksum_mismatch(error: ChecksumMismatch, call: Call) -> _Answer:
    bad = InvalidRequest(Violation("header.weights_sha256", str(error)))
    answer = _invalid(ErrorReason.ERROR_REASON_CHECKSUM_MISMATCH)(bad, call)
    metadata = {"expected_sha256": error.expected, "actual_sha256": error.actual}
    return _Answer(answer.code, answer.reason, metadata, answer.details)


def _control_plane(error: ControlPlaneUnavailable, call: Call) -> _Answer:
    return _Answer(
        code_pb2.UNAVAILABLE,
        ErrorReason.ERROR_REASON_CONTROL_PLANE_UNAVAILABLE,
        {},
        (_retry_info(),),
    )


def _overloaded(error: Overloaded, call: Call) -> _Answer:
    return _Answer(
        code_pb2.RESOURCE_EXHAUSTED,
        ErrorReason.ERROR_REASON_OVERLOADED,
        {"limit": str(error.limit)},
        (_retry_info(),),
    )


def _draining(error: Draining, call: Call) -> _Answer:
    return _Answer(
        code_pb2.UNAVAILABLE,
        ErrorReason.ERROR_REASON_DRAINING,
        {"tokens_emitted": str(call.completion_tokens)},
        (_retry_info(),),
    )


def _shard_unavailable(error: ShardUnavailable, call: Call) -> _Answer:
    return _Answer(
        code_pb2.UNAVAILABLE,
        ErrorReason.ERROR_REASON_SHARD_UNAVAILABLE,
        {"shard": error.shard, "tokens_emitted": str(call.completion_tokens)},
        (_retry_info(),),
    )


def _deadline(error: DefaultDeadlineExceeded, call: Call) -> _Answer:
    return _Answer(
        code_pb2.DEADLINE_EXCEEDED,
        ErrorReason.ERROR_REASON_DEADLINE_EXCEEDED,
        {
            "deadline_s": f"{error.deadline_s:g}",
            "tokens_emitted": str(call.completion_tokens),
        },
    )


def _internal(error: BaseException, call: Call) -> _Answer:
    return _Answer(
        code_pb2.INTERNAL,
        ErrorReason.ERROR_REASON_INTERNAL,
        {"request_id": call.request_id},
        (error_details_pb2.RequestInfo(request_id=call.request_id),),
        INTERNAL_MESSAGE,
    )


def _retry_info() -> error_details_pb2.RetryInfo:
    delay = duration_pb2.Duration()
    delay.FromMilliseconds(int(RETRY_DELAY_S * 1000))
    return error_details_pb2.RetryInfo(retry_delay=delay)


_version_missing = _missing(
    ErrorReason.ERROR_REASON_VERSION_NOT_FOUND, "adapter version", "adapter", "version"
)
_version_not_ready = _says(
    code_pb2.FAILED_PRECONDITION,
    ErrorReason.ERROR_REASON_ADAPTER_NOT_READY,
    *("adapter", "version", "state"),
)

_TABLE: tuple[tuple[type[Exception], Callable[..., _Answer]], ...] = (
    # The first match answers, so a subclass stands before its base.
    (MalformedMessage, _malformed),
    (PromptMissing, _invalid(ErrorReason.ERROR_REASON_PROMPT_MISSING)),
    (PromptTooLong, _invalid(ErrorReason.ERROR_REASON_PROMPT_TOO_LONG)),
    (InvalidStructuredOutput, _invalid(ErrorReason.ERROR_REASON_INVALID_STRUCTURED_OUTPUT)),
    (ChatTemplateRefused, _invalid(ErrorReason.ERROR_REASON_CHAT_TEMPLATE_REFUSED)),
    (InvalidRequest, _invalid(ErrorReason.ERROR_REASON_INVALID_FIELD)),
    (ChatTemplateMissing, _template_missing),
    (VersionNotFound, _version_missing),
    (VersionUnknown, _version_missing),
    (AdapterNotFound, _missing(ErrorReason.ERROR_REASON_ADAPTER_NOT_FOUND, "adapter", "adapter")),
    (AdapterUnknown, _missing(ErrorReason.ERROR_REASON_ADAPTER_NOT_FOUND, "adapter", "adapter")),
    (
        AdapterNotReady,
        _says(code_pb2.FAILED_PRECONDITION, ErrorReason.ERROR_REASON_ADAPTER_NOT_READY, "adapter"),
    ),
    (VersionNotReady, _version_not_ready),
    (TransitionRefused, _version_not_ready),
    (
        AdapterLoadFailed,
        _says(
            code_pb2.FAILED_PRECONDITION,
            ErrorReason.ERROR_REASON_ADAPTER_LOAD_FAILED,
            "adapter",
            "version",
        ),
    ),
    (
        VersionInUse,
        _says(
            code_pb2.FAILED_PRECONDITION,
            ErrorReason.ERROR_REASON_VERSION_IN_USE,
            "adapter",
            "version",
        ),
    ),
    (AdapterInvalid, _adapter_invalid),
    (
        EtagMismatch,
        _says(code_pb2.ABORTED, ErrorReason.ERROR_REASON_ETAG_MISMATCH, "adapter", "etag"),
    ),
    (
        NothingToRollBack,
        _says(
            code_pb2.FAILED_PRECONDITION, ErrorReason.ERROR_REASON_NOTHING_TO_ROLL_BACK, "adapter"
        ),
    ),
    (RequestIdReused, _id_reused),
    (UploadIdReused, _id_reused),
    (
        SourceNotAllowed,
        _says(
            code_pb2.PERMISSION_DENIED,
            ErrorReason.ERROR_REASON_SOURCE_NOT_ALLOWED,
            "source_uri=uri",
        ),
    ),
    (UploadUnknown, _missing(ErrorReason.ERROR_REASON_UPLOAD_NOT_FOUND, "upload", "upload_id")),
    (
        UploadOffsetMismatch,
        _says(
            code_pb2.FAILED_PRECONDITION,
            ErrorReason.ERROR_REASON_UPLOAD_OFFSET_MISMATCH,
            "upload_id",
            "offset=expected",
        ),
    ),
    (
        UploadBusy,
        _says(
            code_pb2.FAILED_PRECONDITION,
            ErrorReason.ERROR_REASON_UPLOAD_OFFSET_MISMATCH,
            "upload_id",
        ),
    ),
    (
        UploadIncomplete,
        _says(
            code_pb2.FAILED_PRECONDITION,
            ErrorReason.ERROR_REASON_UPLOAD_INCOMPLETE,
            "upload_id",
            "offset",
        ),
    ),
    (ChecksumMismatch, _checksum_mismatch),
    (UploadTooLong, _upload_too_long),
    (StorageFull, _says(code_pb2.RESOURCE_EXHAUSTED, ErrorReason.ERROR_REASON_STORAGE_FULL)),
    (
        RequestNotFound,
        _missing(ErrorReason.ERROR_REASON_REQUEST_NOT_FOUND, "request", "request_id"),
    ),
    (
        SequenceUnknown,
        _says(code_pb2.OUT_OF_RANGE, ErrorReason.ERROR_REASON_SEQUENCE_UNKNOWN, "sequence=newest"),
    ),
    (ControlPlaneUnavailable, _control_plane),
    (Overloaded, _overloaded),
    (Draining, _draining),
    (ShardUnavailable, _shard_unavailable),
    (DefaultDeadlineExceeded, _deadline),
)
"""What is not here is a bug, or an engine-internal failure: INTERNAL."""
