"""What each kind of error answers: code, reason, metadata and details.

Used by the table of `gateway/errors.py` and by nothing else.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from google.protobuf import duration_pb2
from google.protobuf.message import Message
from google.rpc import code_pb2, error_details_pb2

from engine.errors import (
    AdapterInvalid,
    AdapterQuarantined,
    ChatTemplateMissing,
    InvalidRequest,
    ShardUnavailable,
    Violation,
)
from engine.ring import ShardLent
from gateway.admission import RETRY_DELAY_S, Draining, Overloaded
from gateway.call import Call
from gateway.exceptions import (
    ControlPlaneUnavailable,
    DefaultDeadlineExceeded,
    MalformedMessage,
)
from lora_gateway.v1.errors_pb2 import ErrorReason
from store.job_records import QueueFull
from store.records import RequestIdReused
from store.uploads import ChecksumMismatch, UploadIdReused, UploadTooLong
from trainer.errors import DatasetInvalid, GateRejected, InvalidSpec, UnservableAdapter

MAX_METADATA_CHARACTERS = 256
LENT_RETRY_DELAY_S = 30.0
"""A shard that is lent is away for minutes at least."""
INTERNAL_MESSAGE = "internal error; report the request id to the operator"


@dataclass(frozen=True, slots=True)
class Answer:
    """Code, reason and details of one kind of error."""

    code: int
    reason: int
    metadata: dict[str, str] = field(default_factory=dict)
    details: tuple[Message, ...] = ()
    message: str = ""
    """Empty: the error's own."""


def invalid(reason: int) -> Callable[[InvalidRequest, Call], Answer]:
    def build(error: InvalidRequest, call: Call) -> Answer:
        bad = error_details_pb2.BadRequest(
            field_violations=[
                error_details_pb2.BadRequest.FieldViolation(
                    field=violation.field, description=violation.description
                )
                for violation in error.violations
            ]
        )
        metadata = {"field": error.violations[0].field, **error.metadata}
        return Answer(code_pb2.INVALID_ARGUMENT, reason, metadata, (bad,))

    return build


def malformed(error: MalformedMessage, call: Call) -> Answer:
    metadata = {"message_type": error.message_type}
    return Answer(code_pb2.INVALID_ARGUMENT, ErrorReason.ERROR_REASON_MALFORMED_MESSAGE, metadata)


def template_missing(error: ChatTemplateMissing, call: Call) -> Answer:
    return Answer(
        code_pb2.FAILED_PRECONDITION,
        ErrorReason.ERROR_REASON_CHAT_TEMPLATE_MISSING,
        {"base_model": error.base_model},
    )


def says(code: int, reason: int, *attributes: str) -> Callable[[Exception, Call], Answer]:
    """An answer whose metadata are attributes of the error; `name=attribute` renames one."""

    def build(error: Exception, call: Call) -> Answer:
        metadata = {}
        for attribute in attributes:
            name, _, source = attribute.partition("=")
            metadata[name] = _text(getattr(error, source or name))
        return Answer(code, reason, metadata)

    return build


def _text(value: object) -> str:
    """A caller's text among metadata must not make trailers that its gRPC refuses."""
    text = value.name if isinstance(value, enum.Enum) else str(value)
    return text[:MAX_METADATA_CHARACTERS]


def missing(reason: int, kind: str, *attributes: str) -> Callable[[Exception, Call], Answer]:
    """NOT_FOUND of a resource, whose name is made of the metadata."""
    told = says(code_pb2.NOT_FOUND, reason, *attributes)

    def build(error: Exception, call: Call) -> Answer:
        metadata = told(error, call).metadata
        resource = error_details_pb2.ResourceInfo(
            resource_type=kind, resource_name="@".join(metadata.values())
        )
        return Answer(code_pb2.NOT_FOUND, reason, metadata, (resource,))

    return build


def exists(reason: int, kind: str, attribute: str) -> Callable[[Exception, Call], Answer]:
    """ALREADY_EXISTS of a resource that an attribute of the error names."""

    def build(error: Exception, call: Call) -> Answer:
        name = _text(getattr(error, attribute))
        resource = error_details_pb2.ResourceInfo(resource_type=kind, resource_name=name)
        return Answer(code_pb2.ALREADY_EXISTS, reason, {attribute: name}, (resource,))

    return build


def field_says(reason: int, field: str, *attributes: str) -> Callable[[Exception, Call], Answer]:
    """INVALID_ARGUMENT of one field, whose metadata are attributes of the error."""

    def build(error: Exception, call: Call) -> Answer:
        bad = InvalidRequest(Violation(field, str(error)))
        metadata = says(code_pb2.INVALID_ARGUMENT, reason, *attributes)(error, call).metadata
        return Answer(
            code_pb2.INVALID_ARGUMENT, reason, metadata, invalid(reason)(bad, call).details
        )

    return build


def adapter_invalid(error: AdapterInvalid, call: Call) -> Answer:
    # All findings, as far as the trailers hold them.
    bad = InvalidRequest(*(Violation("source_uri", finding) for finding in error.findings))
    answer = invalid(ErrorReason.ERROR_REASON_ADAPTER_INVALID)(bad, call)
    metadata = {"adapter": _text(error.adapter)}
    if error.version:
        metadata["version"] = str(error.version)
    first = bad.violations[0].description
    more = f" (and {len(error.findings) - 1} more)" if len(error.findings) > 1 else ""
    message = f"adapter {error.adapter[:64]!r} cannot be served: {first}{more}"
    return Answer(answer.code, answer.reason, metadata, answer.details, message)


def id_reused(error: RequestIdReused | UploadIdReused, call: Call) -> Answer:
    request_id = error.request_id if isinstance(error, RequestIdReused) else error.upload_id
    resource = error_details_pb2.ResourceInfo(resource_type="request", resource_name=request_id)
    return Answer(
        code_pb2.ALREADY_EXISTS,
        ErrorReason.ERROR_REASON_REQUEST_ID_REUSED,
        {"request_id": request_id},
        (resource,),
    )


def upload_too_long(error: UploadTooLong, call: Call) -> Answer:
    bad = InvalidRequest(Violation("chunk", str(error)))
    return invalid(ErrorReason.ERROR_REASON_INVALID_FIELD)(bad, call)


def checksum_mismatch(error: ChecksumMismatch, call: Call) -> Answer:
    field = "header.sha256" if call.method == "UploadDataset" else "header.weights_sha256"
    bad = InvalidRequest(Violation(field, str(error)))
    answer = invalid(ErrorReason.ERROR_REASON_CHECKSUM_MISMATCH)(bad, call)
    metadata = {"expected_sha256": error.expected, "actual_sha256": error.actual}
    return Answer(answer.code, answer.reason, metadata, answer.details)


def control_plane(error: ControlPlaneUnavailable, call: Call) -> Answer:
    return Answer(
        code_pb2.UNAVAILABLE,
        ErrorReason.ERROR_REASON_CONTROL_PLANE_UNAVAILABLE,
        {},
        (_retry_info(),),
    )


def overloaded(error: Overloaded, call: Call) -> Answer:
    return Answer(
        code_pb2.RESOURCE_EXHAUSTED,
        ErrorReason.ERROR_REASON_OVERLOADED,
        {"limit": str(error.limit)},
        (_retry_info(),),
    )


def draining(error: Draining, call: Call) -> Answer:
    return Answer(
        code_pb2.UNAVAILABLE,
        ErrorReason.ERROR_REASON_DRAINING,
        {"tokens_emitted": str(call.completion_tokens)},
        (_retry_info(),),
    )


def shard_unavailable(error: ShardUnavailable, call: Call) -> Answer:
    return Answer(
        code_pb2.UNAVAILABLE,
        ErrorReason.ERROR_REASON_SHARD_UNAVAILABLE,
        {"shard": error.shard, "tokens_emitted": str(call.completion_tokens)},
        (_retry_info(),),
    )


def shard_lent(error: ShardLent, call: Call) -> Answer:
    """As one that is unavailable, but for much longer."""
    unavailable = shard_unavailable(error, call)
    details = (_retry_info(LENT_RETRY_DELAY_S),)
    return replace(unavailable, reason=ErrorReason.ERROR_REASON_SHARD_LENT, details=details)


def quarantined(error: AdapterQuarantined, call: Call) -> Answer:
    delay = duration_pb2.Duration()
    delay.FromMilliseconds(int(error.left_s * 1000))
    return Answer(
        code_pb2.FAILED_PRECONDITION,
        ErrorReason.ERROR_REASON_ADAPTER_QUARANTINED,
        {"adapter": error.adapter, "version": str(error.version), "until": error.until},
        (error_details_pb2.RetryInfo(retry_delay=delay),),
    )


def deadline(error: DefaultDeadlineExceeded, call: Call) -> Answer:
    return Answer(
        code_pb2.DEADLINE_EXCEEDED,
        ErrorReason.ERROR_REASON_DEADLINE_EXCEEDED,
        {
            "deadline_s": f"{error.deadline_s:g}",
            "tokens_emitted": str(call.completion_tokens),
        },
    )


def internal(error: BaseException, call: Call) -> Answer:
    return Answer(
        code_pb2.INTERNAL,
        ErrorReason.ERROR_REASON_INTERNAL,
        {"request_id": call.request_id},
        (error_details_pb2.RequestInfo(request_id=call.request_id),),
        INTERNAL_MESSAGE,
    )


def _retry_info(delay_s: float = RETRY_DELAY_S) -> error_details_pb2.RetryInfo:
    delay = duration_pb2.Duration()
    delay.FromMilliseconds(int(delay_s * 1000))
    return error_details_pb2.RetryInfo(retry_delay=delay)


def invalid_spec(error: InvalidSpec, call: Call) -> Answer:
    """What training says of a request's fields."""
    found = [Violation(finding.field, finding.text) for finding in error.findings]
    return invalid(ErrorReason.ERROR_REASON_INVALID_FIELD)(InvalidRequest(*found), call)


def unservable(error: UnservableAdapter, call: Call) -> Answer:
    """All findings, as far as the trailers hold them."""
    found = [Violation(finding.field, finding.text) for finding in error.findings]
    return invalid(ErrorReason.ERROR_REASON_UNSERVABLE_ADAPTER)(InvalidRequest(*found), call)


def dataset_invalid(error: DatasetInvalid, call: Call) -> Answer:
    """With the counts; ValidateDataset lists the lines."""
    bad = InvalidRequest(*(Violation("dataset", reason) for reason in error.report.reasons))
    metadata = {
        "dataset": error.dataset,
        "total_lines": str(error.report.total_lines),
        "bad_lines": str(error.report.bad_lines),
    }
    answer = invalid(ErrorReason.ERROR_REASON_DATASET_INVALID)(bad, call)
    return Answer(answer.code, answer.reason, metadata, answer.details)


def gate_rejected(error: GateRejected, call: Call) -> Answer:
    """What the gate found."""
    bad = InvalidRequest(*(Violation("step", reason) for reason in error.publication.reasons))
    details = invalid(ErrorReason.ERROR_REASON_GATE_REJECTED)(bad, call).details
    metadata = {"job": error.job, "step": str(error.step)}
    return Answer(
        code_pb2.FAILED_PRECONDITION, ErrorReason.ERROR_REASON_GATE_REJECTED, metadata, details
    )


def queue_full(error: QueueFull, call: Call) -> Answer:
    """With a time to try again."""
    return Answer(
        code_pb2.RESOURCE_EXHAUSTED,
        ErrorReason.ERROR_REASON_QUEUE_FULL,
        {"limit": str(error.limit)},
        (_retry_info(),),
    )
