"""The registry of one host: one SQLite file behind the async seam.

What a method returned survives a crash and a power cut (WAL with synchronous=FULL). Numbers
that may never come back are taken from counters, not from the rows.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from store import (
    sqlite_adapters,
    sqlite_events,
    sqlite_feedback,
    sqlite_lifecycle,
    sqlite_traffic,
    sqlite_versions,
)
from store.records import (
    AdapterRecord,
    Arm,
    Content,
    EventRecord,
    FeedbackSummary,
    Guard,
    NewVersion,
    VersionRecord,
    VersionState,
)
from store.registry import Registry
from store.sqlite_events import Change
from store.sqlite_thread import SqliteThread, check_limit, unobserved

T = TypeVar("T")


class SqliteRegistry(SqliteThread, Registry):
    """One thread owns the connection. See `Registry` for what the methods do.

    StorageFull is raised when the disk is full, and sqlite3.Error when it fails. The state
    folder's lock keeps other hosts away; what else has the file open (a `sqlite3` shell) is
    waited for.
    """

    def __init__(
        self,
        path: Path,
        *,
        clock_ns: Callable[[], int] = time.time_ns,
        observe_commit: Callable[[float], None] = unobserved,
    ) -> None:
        """`clock_ns` tells the time of changes, in nanoseconds since the epoch; `observe_commit`
        how long each took, see `SqliteThread`."""
        super().__init__(path, clock_ns, "registry", observe_commit)

    async def begin_version(self, new: NewVersion, *, request_id: str, actor: str) -> VersionRecord:
        return await self._change(
            actor, lambda change: sqlite_versions.begin_version(change, new, request_id)
        )

    async def complete_version(
        self, tenant: str, adapter: str, version: int, content: Content, *, actor: str
    ) -> tuple[VersionRecord, AdapterRecord]:
        return await self._change(
            actor,
            lambda change: sqlite_lifecycle.complete_version(
                change, tenant, adapter, version, content
            ),
        )

    async def fail_version(
        self, tenant: str, adapter: str, version: int, findings: Sequence[str], *, actor: str
    ) -> VersionRecord:
        return await self._change(
            actor,
            lambda change: sqlite_lifecycle.fail_version(
                change, tenant, adapter, version, findings
            ),
        )

    async def drain_version(
        self, tenant: str, adapter: str, version: int, *, actor: str
    ) -> VersionRecord:
        return await self._change(
            actor,
            lambda change: sqlite_lifecycle.drain_version(change, tenant, adapter, version),
        )

    async def delete_version(
        self, tenant: str, adapter: str, version: int, *, actor: str
    ) -> VersionRecord:
        return await self._change(
            actor,
            lambda change: sqlite_lifecycle.delete_version(change, tenant, adapter, version),
        )

    async def mint_lora_int_id(self, tenant: str, adapter: str, version: int) -> int:
        return await self._write(
            lambda db: sqlite_versions.mint_lora_int_id(db, tenant, adapter, version)
        )

    async def set_traffic(
        self,
        tenant: str,
        adapter: str,
        arms: Sequence[Arm],
        *,
        guard: Guard | None = None,
        etag: str = "",
        actor: str,
        reason: str = "",
    ) -> AdapterRecord:
        return await self._change(
            actor,
            lambda change: sqlite_traffic.set_traffic(
                change, tenant, adapter, arms, guard, etag, reason
            ),
        )

    async def promote(
        self, tenant: str, adapter: str, version: int, *, etag: str = "", actor: str
    ) -> AdapterRecord:
        return await self._change(
            actor,
            lambda change: sqlite_traffic.promote_version(change, tenant, adapter, version, etag),
        )

    async def roll_back(
        self, tenant: str, adapter: str, *, etag: str = "", actor: str, reason: str = ""
    ) -> AdapterRecord:
        return await self._change(
            actor, lambda change: sqlite_traffic.roll_back(change, tenant, adapter, etag, reason)
        )

    async def adapter(self, tenant: str, adapter: str) -> AdapterRecord:
        return await self._read(lambda db: sqlite_adapters.read_adapter(db, tenant, adapter))

    async def adapters(
        self, tenant: str, *, after: str = "", prefix: str = "", limit: int
    ) -> list[AdapterRecord]:
        check_limit(limit)
        return await self._read(
            lambda db: sqlite_adapters.list_adapters(db, tenant, after, prefix, limit)
        )

    async def version(self, tenant: str, adapter: str, version: int) -> VersionRecord:
        return await self._read(
            lambda db: sqlite_versions.read_version(db, tenant, adapter, version)
        )

    async def versions(
        self,
        tenant: str,
        adapter: str,
        *,
        below: int | None = None,
        limit: int,
        deleted: bool = False,
    ) -> list[VersionRecord]:
        check_limit(limit)
        return await self._read(
            lambda db: sqlite_versions.list_versions(db, tenant, adapter, below, limit, deleted)
        )

    async def versions_in(self, state: VersionState) -> list[VersionRecord]:
        return await self._read(lambda db: sqlite_versions.versions_in(db, state))

    async def find_ready(self, tenant: str, adapter: str, digest: str) -> VersionRecord | None:
        return await self._read(lambda db: sqlite_versions.find_ready(db, tenant, adapter, digest))

    async def version_of_request(self, tenant: str, request_id: str) -> VersionRecord | None:
        return await self._read(
            lambda db: sqlite_versions.version_of_request(db, tenant, request_id)
        )

    async def digest_in_use(self, digest: str) -> bool:
        return await self._read(lambda db: sqlite_versions.digest_in_use(db, digest))

    async def snapshot(self) -> list[tuple[AdapterRecord, tuple[int, ...]]]:
        return await self._read(sqlite_adapters.read_snapshot)

    async def events(
        self, tenant: str, *, after: int, limit: int, adapter: str = ""
    ) -> list[EventRecord]:
        check_limit(limit)
        return await self._read(
            lambda db: sqlite_events.list_events(db, tenant, adapter, after, limit)
        )

    async def last_sequence(self) -> int:
        return await self._read(sqlite_events.last_sequence)

    async def record_feedback(
        self, tenant: str, adapter: str, version: int, request_id: str, score: float
    ) -> None:
        await self._write(
            lambda db: sqlite_feedback.record_feedback(
                db, tenant, adapter, version, request_id, score
            )
        )

    async def feedback(self, tenant: str, adapter: str) -> dict[int, FeedbackSummary]:
        return await self._read(lambda db: sqlite_feedback.summarize_feedback(db, tenant, adapter))

    async def _change(self, actor: str, body: Callable[[Change], T]) -> T:
        """Run `body` as a write whose events carry `actor`, and the time when it has its turn:
        later events have later times."""
        return await self._write(lambda db: body(Change(db, actor, self._clock_ns())))
