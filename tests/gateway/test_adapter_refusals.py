"""Every way in which Adapters refuses, with its reason on the wire; and what a bug costs."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio

from engine.errors import ShardUnavailable
from engine.generation import VersionKey
from engine.probe import Probe
from lora_gateway.v1 import adapters_pb2 as pb
from tests.gateway.control_plane import TENANT, TIMEOUT_S, Plane, control_plane, create, named
from tests.gateway.promises import refused

SQL_1 = VersionKey(TENANT, "sql", 1)


@pytest_asyncio.fixture
async def plane(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Plane]:
    async with control_plane(tmp_path, monkeypatch) as plane:
        yield plane


async def validating(plane: Plane) -> None:
    """`sql` with version 1 that has traffic, and version 2 that is not READY yet."""
    await plane.ready()
    plane.shard.may_load.clear()
    await plane.stub.CreateAdapterVersion(create(plane.write_source("b")))


async def get_adapter(plane: Plane, raw: bytes) -> None:
    """GetAdapter with bytes that no client of ours would send."""
    call: Any = plane.gateway.channel.unary_unary("/lora_gateway.v1.Adapters/GetAdapter")
    await call(raw)


Call = Callable[[Plane], Awaitable[object]]
REFUSALS: dict[str, tuple[Call, str, dict[str, str]]] = {
    "an unknown adapter": (
        lambda plane: plane.stub.GetAdapter(pb.GetAdapterRequest(adapter="nosuch")),
        *("ADAPTER_NOT_FOUND", {"adapter": "nosuch"}),
    ),
    "versions of an unknown adapter": (
        lambda plane: plane.stub.ListAdapterVersions(
            pb.ListAdapterVersionsRequest(adapter="nosuch")
        ),
        *("ADAPTER_NOT_FOUND", {"adapter": "nosuch"}),
    ),
    "an unknown version": (
        lambda plane: plane.stub.GetAdapterVersion(named(pb.GetAdapterVersionRequest, version=9)),
        *("VERSION_NOT_FOUND", {"adapter": "sql", "version": "9"}),
    ),
    "traffic for an unknown version": (
        lambda plane: plane.stub.PromoteVersion(named(pb.PromoteVersionRequest, version=9)),
        *("VERSION_NOT_FOUND", {"adapter": "sql", "version": "9"}),
    ),
    "traffic for a version that is not READY": (
        lambda plane: plane.stub.PromoteVersion(named(pb.PromoteVersionRequest, version=2)),
        *("ADAPTER_NOT_READY", {"adapter": "sql", "version": "2", "state": "VALIDATING"}),
    ),
    "loading a version that is not READY": (
        lambda plane: plane.stub.LoadAdapterVersion(named(pb.LoadAdapterVersionRequest, version=9)),
        *("VERSION_NOT_FOUND", {"adapter": "sql", "version": "9"}),
    ),
    "deleting what is being validated": (
        lambda plane: plane.stub.DeleteAdapterVersion(
            named(pb.DeleteAdapterVersionRequest, version=2)
        ),
        *("ADAPTER_NOT_READY", {"adapter": "sql", "version": "2", "state": "VALIDATING"}),
    ),
    "deleting what has traffic": (
        lambda plane: plane.stub.DeleteAdapterVersion(named(pb.DeleteAdapterVersionRequest)),
        *("VERSION_IN_USE", {"adapter": "sql", "version": "1"}),
    ),
    "a source that is not allowed": (
        lambda plane: plane.stub.CreateAdapterVersion(create("/etc")),
        *("SOURCE_NOT_ALLOWED", {"source_uri": "/etc"}),
    ),
    "checking a source that is not allowed": (
        lambda plane: plane.stub.ValidateAdapter(pb.ValidateAdapterRequest(source_uri="s3://b/x")),
        *("SOURCE_NOT_ALLOWED", {"source_uri": "s3://b/x"}),
    ),
    "a source that is none": (
        lambda plane: plane.stub.CreateAdapterVersion(create("not a place")),
        *("ADAPTER_INVALID", {"adapter": "sql"}),
    ),
    "nothing to roll back": (
        lambda plane: plane.stub.RollbackAdapter(pb.RollbackAdapterRequest(adapter="sql")),
        *("NOTHING_TO_ROLL_BACK", {"adapter": "sql"}),
    ),
    "an etag that is old": (
        lambda plane: plane.stub.PromoteVersion(
            pb.PromoteVersionRequest(adapter="sql", version=1, etag="t0")
        ),
        *("ETAG_MISMATCH", {"adapter": "sql", "etag": "t1"}),
    ),
    "a request without its fields": (
        lambda plane: plane.stub.GetAdapterVersion(pb.GetAdapterVersionRequest()),
        *("INVALID_FIELD", {"field": "adapter"}),
    ),
    "bytes that are no message": (
        lambda plane: get_adapter(plane, b"\xff\xff"),
        *("MALFORMED_MESSAGE", {"message_type": "lora_gateway.v1.GetAdapterRequest"}),
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
async def test_a_refusal_has_its_reason_and_changes_nothing(name: str, plane: Plane) -> None:
    await validating(plane)
    before = await plane.registry.last_sequence()
    call, reason, metadata = REFUSALS[name]
    refusal = await refused(call(plane))
    assert (refusal.reason, refusal.metadata) == (reason, metadata)
    assert await plane.registry.last_sequence() == before


async def test_an_engine_that_is_gone_is_unavailable(plane: Plane) -> None:
    await plane.ready()
    await plane.stub.UnloadAdapterVersion(named(pb.UnloadAdapterVersionRequest))
    plane.shard.refuses[SQL_1] = ShardUnavailable("shard-0")
    refusal = await refused(plane.stub.LoadAdapterVersion(named(pb.LoadAdapterVersionRequest)))
    assert refusal.reason == "SHARD_UNAVAILABLE"


async def test_a_bug_is_internal_and_tells_only_its_id(
    plane: Plane, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def bug(*arguments: object, **options: object) -> None:
        raise RuntimeError("secret")

    monkeypatch.setattr(plane.registry, "adapters", bug)
    refusal = await refused(plane.stub.ListAdapters(pb.ListAdaptersRequest()))
    assert refusal.reason == "INTERNAL"
    assert "secret" not in str(refusal)


async def test_a_bug_in_a_validation_fails_the_version_and_nothing_else(
    plane: Plane, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def bug(*arguments: object) -> None:
        raise RuntimeError("secret")

    with monkeypatch.context() as patched:
        patched.setattr(Probe, "findings", bug)
        request = create(plane.write_source("a"), wait=True)
        refusal = await refused(plane.stub.CreateAdapterVersion(request))
    assert refusal.reason == "ADAPTER_INVALID"
    assert "secret" not in refusal.message and "operator" in refusal.message
    assert not plane.shard.loaded
    assert (await plane.ready()).version == 2


async def test_the_hosts_default_deadline_ends_what_should_be_quick_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with control_plane(tmp_path, monkeypatch, default_unary_deadline_s=0.2) as plane:
        plane.shard.may_load.clear()
        patient = asyncio.ensure_future(
            plane.stub.CreateAdapterVersion(create(plane.write_source("a"), wait=True))
        )

        async def stuck(*arguments: object, **options: object) -> None:
            await asyncio.Event().wait()

        with monkeypatch.context() as patched:
            patched.setattr(plane.registry, "adapters", stuck)
            refusal = await refused(plane.stub.ListAdapters(pb.ListAdaptersRequest()))
        assert refusal.reason == "DEADLINE_EXCEEDED"
        assert refusal.metadata == {"deadline_s": "0.2", "tokens_emitted": "0"}
        assert not patient.done()
        plane.shard.may_load.set()
        assert (await patient).adapter_version.state == pb.VERSION_STATE_READY


async def test_while_the_host_ends_callers_are_told_to_come_back(plane: Plane) -> None:
    await plane.control.close()
    with contextlib.suppress(grpc.aio.AioRpcError):
        await plane.stub.ListAdapters(pb.ListAdaptersRequest(), timeout=TIMEOUT_S)
    refusal = await refused(plane.stub.ListAdapters(pb.ListAdaptersRequest(), timeout=TIMEOUT_S))
    assert refusal.reason == "CONTROL_PLANE_UNAVAILABLE"
