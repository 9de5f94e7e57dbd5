"""The registry of one host: one SQLite file behind the async seam.

What a method returned survives a crash and a power cut (WAL with synchronous=FULL). Numbers
that may never come back are taken from counters, not from the rows.
"""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

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
from store.sqlite_schema import connect, reading, transaction

T = TypeVar("T")


class SqliteRegistry(Registry):
    """One thread owns the connection. See `Registry` for what the methods do.

    sqlite3.Error comes through when the disk fails or is full. The state folder's lock keeps
    other hosts away; what else has the file open (a `sqlite3` shell) is waited for.
    """

    def __init__(self, path: Path, *, clock_ns: Callable[[], int] = time.time_ns) -> None:
        """`clock_ns` tells the time of changes, in nanoseconds since the epoch."""
        self._path = path
        self._clock_ns = clock_ns
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="registry")
        self._connection: sqlite3.Connection | None = None  # the thread's alone
        self._closed = False

    async def open(self) -> None:
        await self._call(self._open)

    def _open(self) -> None:
        self._connection = connect(self._path, self._clock_ns())

    async def close(self) -> None:
        if not self._closed:
            self._closed = True
            await self._call(self._close)
            self._thread.shutdown()  # returns at once: the thread has nothing left to do

    def _close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    async def __aenter__(self) -> Self:
        try:
            await self.open()
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

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
        _check_limit(limit)
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
        _check_limit(limit)
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
        _check_limit(limit)
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

    async def _write(self, body: Callable[[sqlite3.Connection], T]) -> T:
        """Run `body` in the thread, as one transaction that is durable when this returns."""

        def run() -> T:
            db = self._opened()
            with transaction(db):
                return body(db)

        return await self._call(run)

    async def _read(self, body: Callable[[sqlite3.Connection], T]) -> T:
        """Run `body` in the thread, on one picture of the file."""

        def run() -> T:
            db = self._opened()
            with reading(db):
                return body(db)

        return await self._call(run)

    def _opened(self) -> sqlite3.Connection:
        if self._connection is None:
            raise RuntimeError("the registry is not open")
        return self._connection

    async def _call(self, function: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function)


def _check_limit(limit: int) -> None:
    if limit < 1:  # SQLite would take a negative one for none
        raise ValueError(f"limit must be at least 1, is {limit}")
