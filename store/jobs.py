"""The job store as its users see it: datasets, jobs, and the events of each job.

A seam. SQLite is behind it for one host (`store/sqlite_jobs.py`), in the file of the registry;
a database that several hosts share can be, and passes the same tests.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from types import TracebackType
from typing import Any, Protocol, Self

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
    NewJob,
)


class JobStore(Protocol):
    """Use as an async context manager, or `open` and `close` it.

    Each method is one transaction: what it returned survives a crash and a power cut, and what
    it raised wrote nothing. A call that is cancelled may still take effect. A full disk is
    `store.upload_folder.StorageFull`; the database's own errors come through when the disk or the
    connection fails.
    """

    async def open(self) -> None:
        """Connect, and bring an older schema up to date. Raises RegistryUnusable."""

    async def close(self) -> None:
        """Finish what runs and let go of the database. Safe to call twice."""

    async def __aenter__(self) -> Self: ...

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None: ...

    # Datasets.

    async def add_dataset(
        self, tenant: str, name: str, *, sha256: str, size_bytes: int, format: str
    ) -> DatasetRecord:
        """The dataset of that name, made unless it is there with the same bytes, and with this
        format if one is asked for.

        Raises InvalidName, or DatasetExists.
        """

    async def dataset(self, tenant: str, name: str) -> DatasetRecord:
        """The dataset. Raises DatasetUnknown."""

    async def datasets(self, tenant: str, *, after: str = "", limit: int) -> list[DatasetRecord]:
        """The first `limit` datasets by name of those that are called above `after`."""

    async def dataset_digests(self) -> set[str]:
        """The SHA-256 of every dataset of every tenant."""

    async def remove_dataset(self, tenant: str, name: str) -> bool:
        """Forget a dataset; whether no other dataset of any tenant has its bytes any more.

        Raises DatasetUnknown, or DatasetInUse while a job that has not ended names it.
        """

    # Jobs.

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
        """A job, VALIDATING, with its first event. A name is made if it has none, and a `uid`,
        which no other job ever had.

        A `request_id` makes it safe to repeat, per tenant: the same fields again return the job
        that they made, as it stands now. Empty: every call makes a job. Raises InvalidName,
        RequestIdReused if the id came with other fields before, JobExists, DatasetUnknown, or
        QueueFull if `max_active` jobs of all tenants have not ended.
        """

    async def job_of_request(self, new: NewJob, request_id: str) -> JobRecord | None:
        """The job that this request made, as it stands now; None: it made none.

        Raises RequestIdReused as `create_job` does.
        """

    async def job(self, tenant: str, name: str) -> JobRecord:
        """The job. Raises JobUnknown."""

    async def jobs(
        self,
        tenant: str,
        *,
        before: int | None = None,
        limit: int,
        states: Collection[JobState] = (),
        adapter: str = "",
    ) -> list[JobRecord]:
        """The newest `limit` jobs of those whose number is below `before` (None: from the top),
        in these states (empty: all) and of this adapter (empty: all).

        There need not be a job of that number: one may be deleted between two pages.
        """

    async def active_jobs(self) -> list[JobKey]:
        """Names all jobs of all tenants that have not ended, oldest first.

        Names only: one job that cannot be read is not to hide the others.
        """

    async def tally(self) -> JobTally:
        """How many jobs of all tenants there are in each state, and the attempts of those that
        have not ended."""

    async def device_uses(self) -> list[DeviceUse]:
        """What each tenant had of the devices lately, by priority of its jobs. Jobs that are
        deleted stay counted."""

    async def change_job(self, seen: JobRecord, change: JobChange) -> JobRecord:
        """Change a job that is still at the epoch that was seen, and write the events.

        A change of state raises the epoch, sets the times that are told of states, and counts
        the device that was given or given back. Raises JobChanged, or JobTransitionRefused.
        """

    async def intend(self, tenant: str, name: str, intent: Intent) -> JobRecord:
        """Say what is wanted of a job. Of one that has ended nothing changes, and an end is not
        taken back; a CANCEL may become a DISCARD. Raises JobUnknown."""

    async def delete_job(self, tenant: str, name: str) -> JobRecord:
        """Forget a job that has ended, with its events; as it was. Raises JobUnknown, or
        JobActive."""

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
        """The first `limit` events above that sequence number, in order, of these kinds (empty:
        all). Raises JobUnknown, also if the job has another uid than this one (empty: any)."""
