"""What every job is run with, and what it makes of a job: its rows, and the plan of a run."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from store.datasets import DatasetFiles
from store.job_records import DatasetRecord, JobRecord
from store.jobs import JobStore
from trainer.device_queue import DeviceQueue
from trainer.devices import Device, device_facts
from trainer.journal import Journal
from trainer.preparation import Prepared
from trainer.publisher import Publisher
from trainer.run_folder import RunFolder, RunPlan
from trainer.served import ServedModel
from trainer.spec import DatasetFormat, DataSpec, JobSpec

MEMORY_SHARE = 0.95
"""Of what is free on a GPU when a run starts; the rest is left to those beside it."""


class Preparer(Protocol):
    """Reads datasets; see `trainer.preparation.Preparations`."""

    async def prepare(self, dataset: DatasetRecord, path: Path, data: DataSpec) -> Prepared:
        """The rows of a dataset, made unless they are there. Cancelled, it stops."""


@dataclass(frozen=True, slots=True)
class Rows:
    """What a job trains on."""

    dataset: DatasetRecord
    prepared: Prepared
    held_out: Prepared | None
    """Of the eval dataset; None: a fraction of the others is held out."""


@dataclass(frozen=True, slots=True)
class Means:
    """What every job is run with."""

    store: JobStore
    journal: Journal
    datasets: DatasetFiles
    preparations: Preparer
    publisher: Publisher
    served: ServedModel
    queue: DeviceQueue
    folder: Path
    """Has the folders of all jobs."""
    command: Callable[[RunFolder], Sequence[str]]
    """Starts a training process."""
    environment: Mapping[str, str]
    """Of training processes, without what is each run's own."""

    async def rows(self, job: JobRecord) -> Rows:
        """The rows of a job; made already, they are found at once. Raises DatasetInvalid."""
        asked, spec = JobSpec.model_validate(job.spec), JobSpec.model_validate(job.effective_spec)
        return await self.rows_of(job.tenant, asked, spec)

    async def rows_of(self, tenant: str, asked: JobSpec, spec: JobSpec) -> Rows:
        """The rows of a spec, as it was asked for and resolved. Raises DatasetInvalid and
        DatasetUnknown."""
        dataset = await self.store.dataset(tenant, spec.dataset)
        prepared = await self._prepared(dataset, spec.data)
        if not spec.data.eval_dataset:
            return Rows(dataset, prepared, None)
        held_out = await self.store.dataset(tenant, spec.data.eval_dataset)
        own = DatasetFormat(held_out.format) if held_out.format else None
        data = spec.data.model_copy(update={"format": asked.data.format or own})
        return Rows(dataset, prepared, await self._prepared(held_out, data))

    async def _prepared(self, dataset: DatasetRecord, data: DataSpec) -> Prepared:
        path = self.datasets.path(dataset.sha256)
        prepared = await self.preparations.prepare(dataset, path, data)
        prepared.require_valid()
        return prepared

    async def plan(self, job: JobRecord, device: Device) -> RunPlan:
        """What the job's attempt is to do on this device.

        Raises DatasetInvalid, or TrainingUnavailable if the device does not answer.
        """
        rows = await self.rows(job)
        return RunPlan(
            tenant=job.tenant,
            job=job.name,
            uid=job.uid,
            attempt=job.attempt,
            spec=JobSpec.model_validate(job.effective_spec),
            model_path=str(self.served.path),
            served_dtype=self.served.dtype,
            fingerprints=self.served.fingerprints,
            device=device.name,
            dataset_sha256=rows.dataset.sha256,
            rows=str(rows.prepared.folder),
            eval_rows="" if rows.held_out is None else str(rows.held_out.folder),
            memory_bytes=await asyncio.to_thread(_memory_bytes, device),
        )


def _memory_bytes(device: Device) -> int:
    """What a run may take of the device; 0: it is given no limit. Raises TrainingUnavailable.

    A limit is there to be tried out (`fit_micro_batch`), and on a CPU that would take the memory
    from serving, or have the kernel end one of the two.
    """
    if not device.on_gpu:
        return 0
    return int(MEMORY_SHARE * device_facts(device).memory_available_bytes)
