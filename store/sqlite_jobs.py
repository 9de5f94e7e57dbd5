"""The job store of one host: the SQLite file of the registry behind the async seam.

It has a thread and a connection of its own, so that jobs that tell much do not hold up the
requests that read the registry.
"""

from __future__ import annotations

import sqlite3
import time
import uuid
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from store import (
    sqlite_datasets,
    sqlite_device_use,
    sqlite_job_changes,
    sqlite_job_creation,
    sqlite_job_events,
    sqlite_job_rows,
)
from store.device_use import DeviceUse
from store.job_records import (
    DatasetRecord,
    EventKind,
    Intent,
    JobChange,
    JobEventRecord,
    JobKey,
    JobRecord,
    JobState,
    JobTally,
    JobUnknown,
    NewJob,
)
from store.jobs import JobStore
from store.sqlite_job_creation import Creation
from store.sqlite_thread import SqliteThread, check_limit, unobserved


def _random_uid() -> str:
    return uuid.uuid4().hex


class SqliteJobs(SqliteThread, JobStore):
    """One thread owns the connection. See `JobStore` for what the methods do.

    StorageFull is raised when the disk is full, and sqlite3.Error when it fails.
    """

    def __init__(
        self,
        path: Path,
        *,
        clock_ns: Callable[[], int] = time.time_ns,
        make_uid: Callable[[], str] = _random_uid,
        observe_commit: Callable[[float], None] = unobserved,
    ) -> None:
        """`clock_ns` tells the time of changes, in nanoseconds since the epoch; `make_uid` gives
        32 hex digits that no job has had; `observe_commit` hears how long each change took, see
        `SqliteThread`."""
        super().__init__(path, clock_ns, "jobs", observe_commit)
        self._make_uid = make_uid

    async def add_dataset(
        self, tenant: str, name: str, *, sha256: str, size_bytes: int, format: str
    ) -> DatasetRecord:
        return await self._write(
            lambda db: sqlite_datasets.add_dataset(
                db, DatasetRecord(tenant, name, sha256, size_bytes, format, self._clock_ns())
            )
        )

    async def dataset(self, tenant: str, name: str) -> DatasetRecord:
        return await self._read(lambda db: sqlite_datasets.read_dataset(db, tenant, name))

    async def datasets(self, tenant: str, *, after: str = "", limit: int) -> list[DatasetRecord]:
        check_limit(limit)
        return await self._read(lambda db: sqlite_datasets.list_datasets(db, tenant, after, limit))

    async def dataset_digests(self) -> set[str]:
        return await self._read(sqlite_datasets.dataset_digests)

    async def remove_dataset(self, tenant: str, name: str) -> bool:
        return await self._write(lambda db: sqlite_datasets.remove_dataset(db, tenant, name))

    async def create_job(
        self,
        new: NewJob,
        *,
        effective_spec: Mapping[str, Any],
        fingerprints: Mapping[str, str],
        publication: Mapping[str, Any],
        request_id: str,
        max_active: int,
        uid: str = "",
    ) -> JobRecord:
        creation = Creation(
            new, effective_spec, fingerprints, publication, request_id, max_active, uid
        )
        return await self._write(
            lambda db: sqlite_job_creation.create_job(
                db, creation, self._clock_ns(), self._make_uid
            )
        )

    async def job_of_request(self, new: NewJob, request_id: str) -> JobRecord | None:
        return await self._read(lambda db: sqlite_job_creation.made_before(db, new, request_id))

    async def job(self, tenant: str, name: str) -> JobRecord:
        return await self._read(lambda db: sqlite_job_rows.read_job(db, tenant, name))

    async def jobs(
        self,
        tenant: str,
        *,
        before: int | None = None,
        limit: int,
        states: Collection[JobState] = (),
        adapter: str = "",
    ) -> list[JobRecord]:
        check_limit(limit)
        return await self._read(
            lambda db: sqlite_job_rows.list_jobs(db, tenant, before, limit, states, adapter)
        )

    async def active_jobs(self) -> list[JobKey]:
        return await self._read(sqlite_job_rows.active_jobs)

    async def tally(self) -> JobTally:
        return await self._read(sqlite_job_rows.tally)

    async def device_uses(self) -> list[DeviceUse]:
        return await self._read(sqlite_device_use.device_uses)

    async def change_job(self, seen: JobRecord, change: JobChange) -> JobRecord:
        return await self._write(
            lambda db: sqlite_job_changes.change_job(db, seen, change, self._clock_ns())
        )

    async def intend(self, tenant: str, name: str, intent: Intent) -> JobRecord:
        return await self._write(lambda db: sqlite_job_changes.intend(db, tenant, name, intent))

    async def delete_job(self, tenant: str, name: str) -> JobRecord:
        return await self._write(lambda db: sqlite_job_changes.delete_job(db, tenant, name))

    async def job_events(
        self,
        tenant: str,
        name: str,
        *,
        after: int,
        limit: int,
        uid: str = "",
        kinds: Collection[EventKind] = (),
    ) -> list[JobEventRecord]:
        check_limit(limit)

        def read(db: sqlite3.Connection) -> list[JobEventRecord]:
            found = sqlite_job_rows.read_job(db, tenant, name).uid
            if uid not in ("", found):
                raise JobUnknown(name)
            return sqlite_job_events.list_job_events(db, found, after, limit, kinds)

        return await self._read(read)
