"""What a call can raise.

    GatewayError                 the call failed; codes without a class below are this one
    ├── InvalidRequest           INVALID_ARGUMENT    fix the request; `violations` names the fields
    ├── NotFound                 NOT_FOUND           no such adapter, or not in that version
    ├── FailedPrecondition       FAILED_PRECONDITION what is served cannot do this
    ├── Conflict                 ABORTED             it changed meanwhile; read again, decide again
    ├── PermissionDenied         PERMISSION_DENIED   the gateway may not read there; upload it
    ├── Overloaded               RESOURCE_EXHAUSTED  come back after `retry_delay_s`
    ├── Unavailable              UNAVAILABLE         nobody answered, or the server had to stop
    ├── DeadlineExceeded         DEADLINE_EXCEEDED   the timeout ended; nothing runs on
    ├── Internal                 INTERNAL, UNKNOWN, DATA_LOSS  a bug; report `request_id`
    └── IncompleteStream         the stream closed in order, but before it was finished

Arguments that cannot be put into a message at all (a float as a token id) raise
`TypeError` or `ValueError` before anything is sent. Cancelling the awaiting task
raises `asyncio.CancelledError` as everywhere, and aborts the call in the server.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import grpc
import grpc.aio

from lora_gateway import _status
from lora_gateway.v1.errors_pb2 import ErrorReason


class Violation(NamedTuple):
    """One thing that is wrong with a request."""

    field: str
    """Path of the field, for example `sampling.top_p`."""
    description: str
    """What is wrong and what would be right."""


class GatewayError(Exception):
    """A call failed. Catch it to handle every failure of the gateway alike."""

    code: grpc.StatusCode
    """The code of the RPC status."""
    reason: ErrorReason.ValueType | None
    """The gateway's reason. None: gRPC or a proxy made the error, or the gateway is newer
    than this client; then `reason_name` tells it."""
    reason_name: str
    """Name of the reason without its `ERROR_REASON_` prefix; empty: there is none."""
    message: str
    """What went wrong, for people. Programs look at `code` and `reason`."""
    metadata: Mapping[str, str]
    """The variables of the message; `errors.proto` lists the keys of each reason."""
    violations: tuple[Violation, ...]
    """All that is wrong with the request."""
    retry_delay_s: float | None
    """When the server expects a retry to be worth it, in seconds from now. None: it did not say."""
    request_id: str
    """The server's id of the request, as in its logs. Empty: not known."""

    def __init__(
        self,
        message: str,
        *,
        code: grpc.StatusCode = grpc.StatusCode.UNKNOWN,
        reason_name: str = "",
        metadata: Mapping[str, str] | None = None,
        violations: tuple[Violation, ...] = (),
        retry_delay_s: float | None = None,
        request_id: str = "",
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        self.reason = _reason_named(reason_name)
        self.reason_name = reason_name
        self.metadata = metadata or {}
        self.violations = violations
        self.retry_delay_s = retry_delay_s
        self.request_id = request_id

    def __str__(self) -> str:
        return f"{' '.join(filter(None, (self.code.name, self.reason_name)))}: {self.message}"

    @staticmethod
    def from_rpc_error(error: grpc.aio.AioRpcError) -> GatewayError:
        """The error of this tree that tells what `error`, of a failed gRPC call, means.

        `GatewayClient` applies it to every call; apply it yourself to calls of a bare
        `InferenceStub`.
        """
        details = _details(error)
        return _class_for(error.code(), details)(
            error.details() or "",
            code=error.code(),
            reason_name=details.reason,
            metadata=details.metadata,
            violations=tuple(Violation(*violation) for violation in details.violations),
            retry_delay_s=details.retry_delay_s,
            request_id=details.request_id,
        )


class InvalidRequest(GatewayError):
    """The request breaks the contract. Catch it to show `violations` to who made the request."""


class NotFound(GatewayError):
    """What the request names is not served. Catch it to fall back to the base model."""


class FailedPrecondition(GatewayError):
    """The request is right, but not for what is served: chat without a chat template, say."""


class Conflict(GatewayError):
    """The adapter changed since its etag was read. Catch it to read again and decide again."""


class PermissionDenied(GatewayError):
    """The gateway may not read an adapter there. Catch it to upload the adapter instead."""


class Overloaded(GatewayError):
    """The gateway takes no more for now. Catch it to come back after `retry_delay_s`."""


class Unavailable(GatewayError):
    """Nobody answered, or the server or its engine had to stop.

    Calls without a token yet were tried again already. Tokens of a stream that came before
    are valid; catch it to ask again for the rest.
    """


class DeadlineExceeded(GatewayError):
    """The timeout ended before the answer did. The server has aborted the request."""


class Internal(GatewayError):
    """A bug of the gateway or a failure in the engine. Its log has the cause at `request_id`."""


class IncompleteStream(GatewayError):
    """A stream without something of it: what ends it, `finished` or `summary`, or an event.

    Something between server and client cut it. What came before is valid. Its code is
    DATA_LOSS, since the one that was sent would claim success.
    """


_STORAGE_FULL = "STORAGE_FULL"

_CLASS_BY_CODE: Mapping[grpc.StatusCode, type[GatewayError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequest,
    grpc.StatusCode.NOT_FOUND: NotFound,
    grpc.StatusCode.FAILED_PRECONDITION: FailedPrecondition,
    grpc.StatusCode.ABORTED: Conflict,
    grpc.StatusCode.PERMISSION_DENIED: PermissionDenied,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Overloaded,
    grpc.StatusCode.UNAVAILABLE: Unavailable,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.INTERNAL: Internal,
    grpc.StatusCode.UNKNOWN: Internal,
    grpc.StatusCode.DATA_LOSS: Internal,
}


def _class_for(code: grpc.StatusCode, details: _status.StatusDetails) -> type[GatewayError]:
    # gRPC itself answers RESOURCE_EXHAUSTED to a message over the size limit. That is no
    # overload: the same message will not fit later either. Nor does a full disk pass by itself.
    passes = details.retry_delay_s is not None or details.reason not in ("", _STORAGE_FULL)
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and not passes:
        return GatewayError
    return _CLASS_BY_CODE.get(code, GatewayError)


def _details(error: grpc.aio.AioRpcError) -> _status.StatusDetails:
    metadata = error.trailing_metadata()
    serialized = metadata.get(_status.METADATA_KEY) if metadata is not None else None
    return _status.decode(serialized) if isinstance(serialized, bytes) else _status.StatusDetails()


def _reason_named(name: str) -> ErrorReason.ValueType | None:
    return dict(ErrorReason.items()).get(f"ERROR_REASON_{name}")
