"""Decodes `grpc-status-details-bin`, the `google.rpc` details of a failed call.

The messages live in a descriptor pool of their own. googleapis-common-protos
would be one more dependency for five small messages, and registering
`google/rpc/*.proto` in the default pool would clash with that package wherever
both are installed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from google.protobuf import any_pb2, duration_pb2, message_factory
from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
)
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message import DecodeError

METADATA_KEY = "grpc-status-details-bin"
"""Key of the trailing metadata under which gRPC carries a serialized `google.rpc.Status`."""

ERROR_DOMAIN = "lora-gateway"
"""Domain of the reasons in `errors.proto`; a proxy in between has reasons of its own."""


@dataclass(frozen=True, slots=True)
class StatusDetails:
    """What the gateway told about an error beyond its code and message."""

    reason: str = ""
    """Name of an `ErrorReason` without its prefix, perhaps one newer than this client."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    """The variables of the message."""
    violations: tuple[tuple[str, str], ...] = ()
    """Field and description of each thing wrong with the request."""
    retry_delay_s: float | None = None
    """How long to wait before another try, in seconds."""
    request_id: str = ""
    """The server's id of the request, as in its logs."""


def decode(serialized: bytes) -> StatusDetails:
    """Decode the value of `METADATA_KEY`.

    Never raises: bytes that cannot be read give what was read before them, since
    details that are broken must not hide the error that they belong to.
    """
    found: dict[str, Any] = {}
    try:
        for packed in _Status.FromString(serialized).details:
            _read_detail(packed, found)
    except DecodeError:
        pass
    return StatusDetails(**found)


def _read_detail(packed: any_pb2.Any, found: dict[str, Any]) -> None:
    match packed.type_url.rpartition("/")[2]:
        case "google.rpc.ErrorInfo":
            info = _ErrorInfo.FromString(packed.value)
            if info.domain == ERROR_DOMAIN:
                found["reason"] = info.reason
                found["metadata"] = {entry.key: entry.value for entry in info.metadata}
                # RequestInfo says it too, but not every error carries one.
                found.setdefault("request_id", found["metadata"].get("request_id", ""))
        case "google.rpc.BadRequest":
            bad = _BadRequest.FromString(packed.value)
            found["violations"] = tuple((v.field, v.description) for v in bad.field_violations)
        case "google.rpc.RetryInfo":
            delay = _RetryInfo.FromString(packed.value).retry_delay
            found["retry_delay_s"] = delay.seconds + delay.nanos / 1e9
        case "google.rpc.RequestInfo":
            found["request_id"] = _RequestInfo.FromString(packed.value).request_id


_INT32 = FieldDescriptorProto.TYPE_INT32
_STRING = FieldDescriptorProto.TYPE_STRING


def _field(
    name: str,
    number: int,
    kind: FieldDescriptorProto.Type.ValueType | str,
    *,
    repeated: bool = False,
) -> FieldDescriptorProto:
    """`kind` is a scalar type, or the full name of a message."""
    label = FieldDescriptorProto.LABEL_REPEATED if repeated else FieldDescriptorProto.LABEL_OPTIONAL
    declared = FieldDescriptorProto(name=name, number=number, label=label)
    if isinstance(kind, str):
        declared.type, declared.type_name = FieldDescriptorProto.TYPE_MESSAGE, kind
    else:
        declared.type = kind
    return declared


# The parts that are read of google/rpc/{status,error_details}.proto; the numbers
# are theirs and frozen. Unknown fields are skipped, as always in protobuf.
_FILE = FileDescriptorProto(
    name="google/rpc/status_details.proto",
    package="google.rpc",
    syntax="proto3",
    dependency=[any_pb2.DESCRIPTOR.name, duration_pb2.DESCRIPTOR.name],
    message_type=[
        DescriptorProto(
            name="Status",
            field=[
                _field("code", 1, _INT32),
                _field("message", 2, _STRING),
                _field("details", 3, ".google.protobuf.Any", repeated=True),
            ],
        ),
        DescriptorProto(
            name="ErrorInfo",
            field=[
                _field("reason", 1, _STRING),
                _field("domain", 2, _STRING),
                _field("metadata", 3, ".google.rpc.MetadataEntry", repeated=True),
            ],
        ),
        # A map is on the wire just this: a repeated message of key and value.
        DescriptorProto(
            name="MetadataEntry", field=[_field("key", 1, _STRING), _field("value", 2, _STRING)]
        ),
        DescriptorProto(
            name="RetryInfo", field=[_field("retry_delay", 1, ".google.protobuf.Duration")]
        ),
        DescriptorProto(
            name="BadRequest",
            field=[_field("field_violations", 1, ".google.rpc.FieldViolation", repeated=True)],
        ),
        DescriptorProto(
            name="FieldViolation",
            field=[_field("field", 1, _STRING), _field("description", 2, _STRING)],
        ),
        DescriptorProto(name="RequestInfo", field=[_field("request_id", 1, _STRING)]),
    ],
)

_pool = DescriptorPool()
for _serialized_file in (
    any_pb2.DESCRIPTOR.serialized_pb,
    duration_pb2.DESCRIPTOR.serialized_pb,
    _FILE.SerializeToString(),
):
    _pool.AddSerializedFile(_serialized_file)


def _message_class(name: str) -> Any:
    # Any: classes made at run time have no stubs.
    return message_factory.GetMessageClass(_pool.FindMessageTypeByName(f"google.rpc.{name}"))


_Status = _message_class("Status")
_ErrorInfo = _message_class("ErrorInfo")
_RetryInfo = _message_class("RetryInfo")
_BadRequest = _message_class("BadRequest")
_RequestInfo = _message_class("RequestInfo")
