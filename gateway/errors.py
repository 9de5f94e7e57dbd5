"""Exceptions to statuses: one table, and the only one.

Codes and reasons are the contract of `errors.proto`. Every status carries one ErrorInfo and
what else its code asks for (AIP-193); a bug answers with a fixed text and an id, never with
the exception's own words.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import Message
from google.rpc import code_pb2, error_details_pb2, status_pb2

from engine.errors import (
    AdapterInvalid,
    AdapterNotFound,
    ChatTemplateMissing,
    ChatTemplateRefused,
    InvalidRequest,
    InvalidStructuredOutput,
    PromptMissing,
    PromptTooLong,
    ShardUnavailable,
    VersionNotFound,
)
from gateway.admission import RETRY_DELAY_S, Draining, Overloaded
from gateway.call import Call
from lora_gateway.v1.errors_pb2 import ErrorReason

DOMAIN = "lora-gateway"
INTERNAL_MESSAGE = "internal error; report the request id to the operator"


class MalformedMessage(Exception):
    """The request's bytes are no message of the method's type."""

    def __init__(self, message_type: str) -> None:
        super().__init__(
            f"the request is no valid {message_type}: generate the client from the current "
            ".proto files and send strings as UTF-8"
        )
        self.message_type = message_type


class DefaultDeadlineExceeded(Exception):
    """The server's default deadline ended; the client had set none."""

    def __init__(self, deadline_s: float) -> None:
        super().__init__(
            f"took longer than the server's default deadline of {deadline_s:g} s; "
            "set a deadline on the call to choose your own"
        )
        self.deadline_s = deadline_s


@dataclass(frozen=True, slots=True)
class _Answer:
    """Code, reason and details of one kind of error."""

    code: int
    reason: int
    metadata: dict[str, str] = field(default_factory=dict)
    details: tuple[Message, ...] = ()


def status_of(error: BaseException, call: Call) -> status_pb2.Status:
    """The status that tells `error` to the caller of `call`."""
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
    internal = answer.reason == ErrorReason.ERROR_REASON_INTERNAL
    status = status_pb2.Status(
        code=answer.code, message=INTERNAL_MESSAGE if internal else str(error)
    )
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


def _adapter_not_found(error: AdapterNotFound, call: Call) -> _Answer:
    resource = error_details_pb2.ResourceInfo(resource_type="adapter", resource_name=error.adapter)
    metadata = {"adapter": error.adapter}
    reason = ErrorReason.ERROR_REASON_ADAPTER_NOT_FOUND
    if isinstance(error, VersionNotFound):
        metadata["version"] = str(error.version)
        resource.resource_type = "adapter version"
        resource.resource_name = f"{error.adapter}@{error.version}"
        reason = ErrorReason.ERROR_REASON_VERSION_NOT_FOUND
    return _Answer(code_pb2.NOT_FOUND, reason, metadata, (resource,))


def _adapter_invalid(error: AdapterInvalid, call: Call) -> _Answer:
    return _Answer(
        code_pb2.INVALID_ARGUMENT,
        ErrorReason.ERROR_REASON_ADAPTER_INVALID,
        {"adapter": error.adapter},
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
    )


def _retry_info() -> error_details_pb2.RetryInfo:
    delay = duration_pb2.Duration()
    delay.FromMilliseconds(int(RETRY_DELAY_S * 1000))
    return error_details_pb2.RetryInfo(retry_delay=delay)


_TABLE: tuple[tuple[type[Exception], Callable[..., _Answer]], ...] = (
    # The first match answers, so a subclass stands before its base.
    (MalformedMessage, _malformed),
    (PromptMissing, _invalid(ErrorReason.ERROR_REASON_PROMPT_MISSING)),
    (PromptTooLong, _invalid(ErrorReason.ERROR_REASON_PROMPT_TOO_LONG)),
    (InvalidStructuredOutput, _invalid(ErrorReason.ERROR_REASON_INVALID_STRUCTURED_OUTPUT)),
    (ChatTemplateRefused, _invalid(ErrorReason.ERROR_REASON_CHAT_TEMPLATE_REFUSED)),
    (InvalidRequest, _invalid(ErrorReason.ERROR_REASON_INVALID_FIELD)),
    (ChatTemplateMissing, _template_missing),
    (AdapterNotFound, _adapter_not_found),
    (AdapterInvalid, _adapter_invalid),
    (Overloaded, _overloaded),
    (Draining, _draining),
    (ShardUnavailable, _shard_unavailable),
    (DefaultDeadlineExceeded, _deadline),
)
"""What is not here is a bug, or an engine-internal failure: INTERNAL."""
