"""A job store in memory, with the transitions of all job stores: fast, and as good as its process.

That it does what the one of SQLite does is shown by running the same seeds on both.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any

from store.device_use import DeviceUse, use_after
from store.job_records import (
    DatasetRecord,
    EventKind,
    Intent,
    JobChange,
    JobChanged,
    JobEventRecord,
    JobKey,
    JobRecord,
    JobState,
    JobUnknown,
    NewEvent,
    NewJob,
)
from store.job_transitions import changed, state_changed


class MemoryJobs:
    """What the trainer calls of `JobStore`."""

    def __init__(self, clock_ns: Callable[[], int], make_uid: Callable[[], str]) -> None:
        self._clock_ns = clock_ns
        self._make_uid = make_uid
        self._datasets: dict[tuple[str, str], DatasetRecord] = {}
        self._jobs: dict[JobKey, JobRecord] = {}
        self._events: dict[str, list[JobEventRecord]] = {}
        self._uses: dict[tuple[str, int], DeviceUse] = {}

    async def add_dataset(
        self, tenant: str, name: str, *, sha256: str, size_bytes: int, format: str
    ) -> DatasetRecord:
        record = DatasetRecord(tenant, name, sha256, size_bytes, format, self._clock_ns())
        return self._datasets.setdefault((tenant, name), record)

    async def dataset(self, tenant: str, name: str) -> DatasetRecord:
        return self._datasets[tenant, name]

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
        now_ns, uid = self._clock_ns(), uid or self._make_uid()
        record = JobRecord(
            tenant=new.tenant,
            name=new.name,
            uid=uid,
            number=len(self._jobs) + 1,
            adapter=new.adapter,
            dataset=new.dataset,
            eval_dataset=new.eval_dataset,
            spec=new.spec,
            effective_spec=effective_spec,
            fingerprints=fingerprints,
            labels=new.labels,
            priority=new.priority,
            state=JobState.VALIDATING,
            intent=Intent.RUN,
            epoch=1,
            attempt=0,
            device="",
            ingested_bytes=0,
            last_sequence=0,
            publication=publication,
            progress=None,
            manifest=None,
            error=None,
            notices=[],
            recovery={},
            create_time_ns=now_ns,
            queue_time_ns=None,
            device_time_ns=None,
            start_time_ns=None,
            end_time_ns=None,
        )
        self._events[uid] = []
        return self._keep(record, [state_changed(None, JobState.VALIDATING)], now_ns)

    async def job(self, tenant: str, name: str) -> JobRecord:
        found = self._jobs.get(JobKey(tenant, name))
        if found is None:
            raise JobUnknown(name)
        return found

    async def active_jobs(self) -> list[JobKey]:
        return [key for key, job in self._jobs.items() if not job.state.is_final]

    async def change_job(self, seen: JobRecord, change: JobChange) -> JobRecord:
        found = self._jobs.get(seen.key)
        if found is None or (found.uid, found.epoch) != (seen.uid, seen.epoch):
            raise JobChanged(seen.name, seen.epoch)
        now_ns = self._clock_ns()
        after, events = changed(found, change, now_ns)
        use = use_after(self._uses, found, after, now_ns)
        if use is not None:
            self._uses[use.tenant, use.priority] = use
        return self._keep(after, events, now_ns)

    async def device_uses(self) -> list[DeviceUse]:
        return list(self._uses.values())

    async def intend(self, tenant: str, name: str, intent: Intent) -> JobRecord:
        found = await self.job(tenant, name)
        if found.state.is_final:
            return found
        return self._keep(replace(found, intent=found.intent.then(intent)), [], 0)

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
        events = self._events[(await self.job(tenant, name)).uid]
        wanted = [event for event in events[after:] if not kinds or event.kind in kinds]
        return wanted[:limit]

    def _keep(self, record: JobRecord, events: list[NewEvent], now_ns: int) -> JobRecord:
        told = self._events[record.uid]
        for event in events:
            time_ns = now_ns if event.time_ns is None else event.time_ns
            told.append(
                JobEventRecord(len(told) + 1, time_ns, record.attempt, event.kind, event.payload)
            )
        kept = self._jobs[record.key] = replace(record, last_sequence=len(told))
        return kept
