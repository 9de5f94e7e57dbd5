"""The journal: every change of a job goes through here, and wakes up who watches the job.

A change that was begun is finished, whoever asked for it leaves meanwhile. A watcher is a place
in the events of the store and a wake-up, so a slow one costs nothing and misses nothing. What all
of them read after a change is read once.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import AsyncGenerator, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from store.job_records import (
    HAS_PROCESS,
    JobChange,
    JobChanged,
    JobEventRecord,
    JobRecord,
    JobState,
    JobUnknown,
)
from store.jobs import JobStore
from store.shared_reads import SharedReads
from trainer.job_folder import JobFolder

EVENTS_PER_READ = 32
"""Events that a watcher reads at once; a slow one holds no more in memory. One that read none of
10,000 events cost 600 KiB with 256, and 190 KiB with 32, most of it in gRPC's buffers."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """A sign of life of a job in which nothing happens."""

    sequence: int
    """Of the job's newest event; all up to it have been told."""
    state: JobState
    trainer_time_ns: int | None
    """When the training process last showed that it lives; None: there is none."""


class Journal:
    """Changes of jobs, and those who watch them. Owned by `Jobs`, which calls `close`."""

    def __init__(self, store: JobStore, folder: Path) -> None:
        """`folder` has the folders of all jobs."""
        self._store = store
        self._folder = folder
        self._changed: dict[str, asyncio.Event] = {}
        """By job; replaced with each change."""
        self._reads = SharedReads()
        self._commits: set[asyncio.Task[Any]] = set()

    async def close(self) -> None:
        """Finish what was begun."""
        if self._commits:
            await asyncio.wait(self._commits)

    async def change(self, seen: JobRecord, change: JobChange) -> JobRecord:
        """Change a job as `JobStore.change_job` does, to the end even if we are cancelled."""
        return await self.surely(self._change(seen, change))

    async def move(self, key_of: JobRecord, change: JobChange) -> JobRecord:
        """The same, from whichever state it is in by now, unless it has ended."""
        while True:
            seen = await self._store.job(key_of.tenant, key_of.name)
            if seen.uid != key_of.uid:
                raise JobUnknown(key_of.name)
            if seen.state.is_final or seen.state is change.state:
                return seen
            with contextlib.suppress(JobChanged):
                return await self.change(seen, change)

    async def surely(self, work: Coroutine[Any, Any, T]) -> T:
        """Do `work` to its end, also if its caller leaves."""
        task = asyncio.create_task(work)
        self._commits.add(task)
        task.add_done_callback(self._commits.discard)
        return await asyncio.shield(task)

    async def _change(self, seen: JobRecord, change: JobChange) -> JobRecord:
        record = await self._store.change_job(seen, change)
        if (changed := self._changed.pop(seen.uid, None)) is not None:
            changed.set()
        return record

    def next_change(self, uid: str) -> asyncio.Event:
        """Set by the next change of a job. Take it before reading what may change."""
        return self._changed.setdefault(uid, asyncio.Event())

    async def watch(
        self, tenant: str, name: str, *, after: int, heartbeat_s: float
    ) -> AsyncGenerator[JobEventRecord | Heartbeat, None]:
        """Events after a sequence number, then new ones as they come, without a gap, up to the
        last one of a job that has ended. A heartbeat where nothing came for `heartbeat_s`.

        Raises JobUnknown, also when the job is deleted meanwhile.
        """
        uid = (await self._store.job(tenant, name)).uid
        clock = asyncio.get_running_loop().time
        due_s = clock() + heartbeat_s
        while True:
            changed = self.next_change(uid)
            job = await self._reads.read(changed, lambda: self._store.job(tenant, name))
            if job.uid != uid:
                raise JobUnknown(name)
            while after < job.last_sequence:
                events = await self._reads.read(
                    (changed, after), functools.partial(self._events, job, after)
                )
                if not events:
                    break  # look again what became of the job
                for event in events:
                    after = event.sequence
                    yield event
                due_s = clock() + heartbeat_s
            if job.state.is_final:
                self._changed.pop(uid, None)
                return
            if clock() >= due_s:
                yield Heartbeat(job.last_sequence, job.state, await self._trainer_time_ns(job))
                due_s = clock() + heartbeat_s
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(changed.wait(), max(0.0, due_s - clock()))

    async def _events(self, job: JobRecord, after: int) -> list[JobEventRecord]:
        return await self._store.job_events(
            job.tenant, job.name, after=after, limit=EVENTS_PER_READ, uid=job.uid
        )

    async def _trainer_time_ns(self, job: JobRecord) -> int | None:
        if job.state not in HAS_PROCESS or not job.attempt:
            return None
        alive = JobFolder(self._folder / job.uid).run(job.attempt).alive
        try:
            return (await asyncio.to_thread(alive.stat)).st_mtime_ns
        except FileNotFoundError:
            return None
