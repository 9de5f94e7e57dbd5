"""Steps that tests of a registry take: a version asked for, READY, or in any other state."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Protocol

from store.records import Content, NewVersion, VersionRecord, VersionState
from store.registry import Registry

ACTOR = "alice"
ONE, TWO = "1" * 64, "2" * 64


class MakeRegistry(Protocol):
    """Opens the database of that name, which is made when it is missing."""

    def __call__(
        self, name: str = "registry", *, clock_ns: Callable[[], int] = time.time_ns
    ) -> AbstractAsyncContextManager[Registry]: ...


class Ticks:
    """A clock that goes on by 1 ns whenever it is looked at."""

    def __init__(self, start_ns: int = 0) -> None:
        self.now_ns = start_ns

    def __call__(self) -> int:
        self.now_ns += 1
        return self.now_ns


def content(digest: str = ONE) -> Content:
    """What a check learned of files with that digest."""
    return Content(
        digest=digest,
        weights_sha256="a" * 64,
        size_bytes=5 * 1024**3,
        rank=16,
        target_modules=("k_proj", "q_proj"),
    )


async def begin(
    registry: Registry,
    adapter: str = "sql",
    *,
    tenant: str = "acme",
    take_traffic: bool = True,
) -> VersionRecord:
    """A version that is VALIDATING."""
    new = NewVersion(tenant, adapter, f"/adapters/{adapter}", take_traffic=take_traffic)
    return await registry.begin_version(new, request_id="", actor=ACTOR)


async def ready(
    registry: Registry,
    adapter: str = "sql",
    *,
    tenant: str = "acme",
    digest: str = ONE,
    take_traffic: bool = True,
) -> VersionRecord:
    """A version that is READY, and has all traffic if it is the adapter's first."""
    begun = await begin(registry, adapter, tenant=tenant, take_traffic=take_traffic)
    record, _ = await registry.complete_version(
        tenant, adapter, begun.version, content(digest), actor=ACTOR
    )
    return record


async def bring_to(registry: Registry, state: VersionState) -> VersionRecord:
    """A version of acme's adapter `sql` in that state, without traffic."""
    begun = await begin(registry, take_traffic=False)
    name = (begun.tenant, begun.adapter, begun.version)
    match state:
        case VersionState.VALIDATING:
            pass
        case VersionState.FAILED:
            await registry.fail_version(*name, ["bad"], actor=ACTOR)
        case VersionState.READY | VersionState.DRAINING | VersionState.DELETED:
            await registry.complete_version(*name, content(), actor=ACTOR)
            if state is not VersionState.READY:
                await registry.drain_version(*name, actor=ACTOR)
            if state is VersionState.DELETED:
                await registry.delete_version(*name, actor=ACTOR)
    return await registry.version(*name)
