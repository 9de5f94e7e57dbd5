"""Steps that tests of a job store take: a dataset, a job, a job in any state."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Protocol

from store.job_records import DatasetRecord, JobChange, JobRecord, JobState, NewJob
from store.jobs import JobStore
from tests.store.registry_steps import ONE

SPEC = {"adapter": "sql", "data": {"dataset": "corpus"}, "optimizer": {"steps": 10}}
EFFECTIVE_SPEC = {**SPEC, "seed": 7}
FINGERPRINTS = {"weights_sha256": "w"}
PENDING = {"state": "pending", "adapter": "sql"}
WAY = {
    JobState.VALIDATING: (),
    JobState.QUEUED: (JobState.QUEUED,),
    JobState.PREPARING: (JobState.QUEUED, JobState.PREPARING),
    JobState.RUNNING: (JobState.QUEUED, JobState.PREPARING, JobState.RUNNING),
    JobState.FINALIZING: (
        JobState.QUEUED,
        JobState.PREPARING,
        JobState.RUNNING,
        JobState.FINALIZING,
    ),
    JobState.SUCCEEDED: (
        JobState.QUEUED,
        JobState.PREPARING,
        JobState.RUNNING,
        JobState.FINALIZING,
        JobState.SUCCEEDED,
    ),
    JobState.PAUSING: (JobState.QUEUED, JobState.PREPARING, JobState.PAUSING),
    JobState.PAUSED: (JobState.QUEUED, JobState.PAUSED),
    JobState.RECOVERING: (JobState.QUEUED, JobState.PREPARING, JobState.RECOVERING),
    JobState.CANCELLING: (JobState.CANCELLING,),
    JobState.CANCELLED: (JobState.CANCELLING, JobState.CANCELLED),
    JobState.FAILED: (JobState.FAILED,),
}
"""From VALIDATING to each state."""


class MakeJobs(Protocol):
    """Opens the database of that name, which is made when it is missing."""

    def __call__(
        self, name: str = "jobs", *, clock_ns: Callable[[], int] = time.time_ns
    ) -> AbstractAsyncContextManager[JobStore]: ...


async def add_dataset(
    store: JobStore, name: str = "corpus", *, tenant: str = "acme", sha256: str = ONE
) -> DatasetRecord:
    """A dataset of 12 bytes."""
    return await store.add_dataset(tenant, name, sha256=sha256, size_bytes=12, format="chat")


def new_job(
    name: str = "",
    *,
    tenant: str = "acme",
    adapter: str = "sql",
    dataset: str = "corpus",
    eval_dataset: str = "",
    priority: int = 0,
) -> NewJob:
    """A job to be asked for."""
    return NewJob(tenant, name, adapter, dataset, eval_dataset, SPEC, priority=priority)


async def create(
    store: JobStore,
    new: NewJob | None = None,
    *,
    request_id: str = "",
    max_active: int = 1000,
    uid: str = "",
) -> JobRecord:
    """A job; its datasets are there."""
    return await store.create_job(
        new or new_job(),
        effective_spec=EFFECTIVE_SPEC,
        fingerprints=FINGERPRINTS,
        publication=PENDING,
        request_id=request_id,
        max_active=max_active,
        uid=uid,
    )


async def bring_to(store: JobStore, state: JobState, new: NewJob | None = None) -> JobRecord:
    """A job in that state, with the dataset that it needs."""
    asked_for = new or new_job()
    await add_dataset(store, asked_for.dataset, tenant=asked_for.tenant)
    job = await create(store, asked_for)
    for next_state in WAY[state]:
        job = await store.change_job(job, JobChange(state=next_state))
    return job
