"""What errors.proto promises of each reason, by its comments, and whether an error keeps it."""

from __future__ import annotations

import re
from collections.abc import Awaitable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.message import Message
from google.rpc import code_pb2, error_details_pb2, status_pb2

from tests.details import DETAILS_KEY

PROTO = Path(__file__).parents[2] / "proto" / "lora_gateway" / "v1" / "errors.proto"
PREFIX = "ERROR_REASON_"
DETAILS: dict[str, type[Message]] = {
    name: getattr(error_details_pb2, name)
    for name in ("ErrorInfo", "BadRequest", "ResourceInfo", "RetryInfo", "RequestInfo")
}

ONLY_OF_JOBS = set[str]()
"""Reasons that no status has."""


@dataclass(frozen=True)
class Documented:
    """What the comment of an ErrorReason promises."""

    code: str
    metadata: frozenset[str]
    details: frozenset[str]
    """Types beside ErrorInfo."""


def documented() -> dict[str, Documented]:
    """By reason, without the prefix."""
    found = re.findall(rf"((?: *//.*\n)+) *{PREFIX}(\w+) = [1-9]\d*;", PROTO.read_text())
    promises = {}
    for raw, reason in found:
        comment = re.sub(r"\s*//\s?", " ", raw)
        if "Only in `Job.error`." in comment:
            ONLY_OF_JOBS.add(reason)
            continue
        code = re.search(r"\bCode ([A-Z_]+)", comment)
        assert code, f"{reason} has no code"
        metadata = re.findall(r"`([a-z0-9_]+)`", comment.partition("Metadata: ")[2])
        details = {name for name in DETAILS if re.search(rf"\b{name}\b", comment)}
        promises[reason] = Documented(code[1], frozenset(metadata), frozenset(details))
    return promises


PROMISED = documented()


def details_of(status: status_pb2.Status) -> dict[str, Any]:
    """Details by type name. Fails where one type is there twice."""
    found: dict[str, Any] = {}
    for packed in status.details:
        name = packed.TypeName().removeprefix("google.rpc.")
        assert name not in found, f"two details of type {name}"
        message = DETAILS[name]()
        assert packed.Unpack(message)
        found[name] = message
    return found


def reason_kept(status: status_pb2.Status) -> str:
    """The reason of a status, once it has the code and the details that are documented for it."""
    details = details_of(status)
    info = details["ErrorInfo"]
    assert info.domain == "lora-gateway"
    promise = PROMISED[info.reason]
    assert code_pb2.Code.Name(status.code) == promise.code
    assert details.keys() == {"ErrorInfo"} | promise.details
    assert info.metadata.keys() <= promise.metadata
    assert all(info.metadata.values())
    return str(info.reason)


@dataclass(frozen=True)
class Refusal:
    """An error as a client received it, with all that its reason promises."""

    reason: str
    message: str
    metadata: dict[str, str]
    details: dict[str, Any]
    """By type name."""

    @property
    def fields(self) -> list[str]:
        """Those that the BadRequest names, in order."""
        return [violation.field for violation in self.details["BadRequest"].field_violations]


def refusal_of(error: grpc.aio.AioRpcError) -> Refusal:
    """What the client was told. Fails where it is not as documented."""
    raw = dict(error.trailing_metadata() or ()).get(DETAILS_KEY)
    assert raw is not None, f"{error.code()} without details: {error.details()}"
    status = status_pb2.Status.FromString(raw)
    assert (status.code, status.message) == (error.code().value[0], error.details())
    details = details_of(status)
    metadata = dict(details["ErrorInfo"].metadata)
    return Refusal(reason_kept(status), status.message, metadata, details)


async def refused(call: Awaitable[object]) -> Refusal:
    """The refusal of a call that must fail."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return refusal_of(caught.value)
