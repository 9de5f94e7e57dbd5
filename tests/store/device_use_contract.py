"""What every job store counts of devices; see `tests/store/job_contract.py`."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from store.device_use import HALF_LIFE_S, DeviceUse, held_s
from store.job_records import JobChange, JobRecord, JobState
from store.jobs import JobStore
from tests.store.job_steps import MakeJobs, add_dataset, create, new_job

HALF_LIFE_NS = round(HALF_LIFE_S * 1e9)


@dataclass
class Hand:
    """A clock that goes on when it is told to."""

    now_ns: int = 1_000

    def __call__(self) -> int:
        return self.now_ns

    def passes(self, duration_s: float) -> None:
        self.now_ns += round(duration_s * 1e9)


async def at(store: JobStore, job: JobRecord, *states: JobState) -> JobRecord:
    for state in states:
        job = await store.change_job(job, JobChange(state=state))
    return job


async def begin(store: JobStore, tenant: str = "acme", priority: int = 0) -> JobRecord:
    await add_dataset(store, tenant=tenant)
    job = await create(store, new_job(tenant=tenant, priority=priority))
    return await at(store, job, JobState.QUEUED, JobState.PREPARING)


class DeviceUseContract:
    """Tests of what tenants had of the devices."""

    async def test_times_of_the_queue_and_the_device_are_those_of_the_states(
        self, make_jobs: MakeJobs
    ) -> None:
        clock = Hand()
        async with make_jobs(clock_ns=clock) as store:
            await add_dataset(store)
            job = await create(store)
            told = []
            for state in (
                *(JobState.QUEUED, JobState.PREPARING, JobState.RUNNING, JobState.RECOVERING),
                *(JobState.QUEUED, JobState.PREPARING, JobState.RUNNING, JobState.CANCELLING),
            ):
                clock.now_ns += 1_000
                job = await store.change_job(job, JobChange(state=state))
                told.append((job.queue_time_ns, job.device_time_ns))
            cancelled = await store.change_job(job, JobChange(state=JobState.CANCELLED))
        assert told == [
            *((2_000, None), (2_000, 3_000), (2_000, 3_000), (2_000, None)),
            *((6_000, None), (6_000, 7_000), (6_000, 7_000), (6_000, 7_000)),
        ]
        assert cancelled.device_time_ns is None
        async with make_jobs() as again:
            assert await again.job("acme", job.name) == cancelled

    async def test_a_tenant_is_told_what_its_jobs_had_also_once_they_are_deleted(
        self, make_jobs: MakeJobs
    ) -> None:
        clock = Hand()
        async with make_jobs(clock_ns=clock) as store:
            assert await store.device_uses() == []
            job = await begin(store, priority=3)
            began_ns = clock.now_ns
            assert await store.device_uses() == [DeviceUse("acme", 3, grant_time_ns=began_ns)]
            clock.passes(HALF_LIFE_S)
            await at(store, job, JobState.FAILED)
            await store.delete_job("acme", job.name)
        async with make_jobs() as again:
            (use,) = await again.device_uses()
        used_s = held_s(began_ns, clock.now_ns)
        assert use == DeviceUse("acme", 3, used_s, clock.now_ns, began_ns)
        assert use.used_at(clock.now_ns + HALF_LIFE_NS) == pytest.approx(used_s / 2)
        assert use.used_at(began_ns) == used_s, "a clock that is set back makes nothing more"

    async def test_each_tenant_and_priority_counts_by_itself_and_all_runs_together(
        self, make_jobs: MakeJobs
    ) -> None:
        clock = Hand()
        async with make_jobs(clock_ns=clock) as store:
            for tenant, priority, had_s in [
                *(("acme", 0, 60.0), ("acme", 1, 30.0), ("other", 0, 10.0), ("acme", 0, 60.0))
            ]:
                job = await begin(store, tenant, priority)
                clock.passes(had_s)
                await at(store, job, JobState.RUNNING, JobState.FINALIZING)
            uses = await store.device_uses()
        told = [(use.tenant, use.priority, round(use.used_at(clock.now_ns), 0)) for use in uses]
        assert told == [("acme", 0, 120.0), ("acme", 1, 30.0), ("other", 0, 10.0)]

    async def test_what_never_had_a_device_counts_nothing(self, make_jobs: MakeJobs) -> None:
        async with make_jobs() as store:
            await add_dataset(store)
            job = await at(store, await create(store), JobState.QUEUED, JobState.CANCELLING)
            assert job.device_time_ns is None
            await at(store, job, JobState.CANCELLED)
            assert await store.device_uses() == []
