"""google.rpc details of a failed call, for tests."""

from __future__ import annotations

from typing import Any, TypeVar

import grpc
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

DETAILS_KEY = "grpc-status-details-bin"

M = TypeVar("M", bound=Message)


def detail(error: grpc.aio.AioRpcError, kind: type[M]) -> M:
    """The one detail of that type. Fails if there is none, or more than one."""
    raw = dict(error.trailing_metadata() or ()).get(DETAILS_KEY)
    assert raw is not None, f"{error.code()} without details: {error.details()}"
    status: Any = status_pb2.Status.FromString(raw)
    assert status.code == error.code().value[0]
    found = [packed for packed in status.details if packed.Is(kind.DESCRIPTOR)]
    assert len(found) == 1, f"{len(found)} details of type {kind.__name__}"
    message = kind()
    found[0].Unpack(message)
    return message


def error_info(error: grpc.aio.AioRpcError) -> Any:
    """Its ErrorInfo, which every error of ours has."""
    info = detail(error, error_details_pb2.ErrorInfo)
    assert info.domain == "lora-gateway"
    return info


def bad_fields(error: grpc.aio.AioRpcError) -> set[str]:
    """The fields that its BadRequest names."""
    bad = detail(error, error_details_pb2.BadRequest)
    return {violation.field for violation in bad.field_violations}
