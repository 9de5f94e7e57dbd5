"""What every job is run with, and what it makes of a job: its rows, and the plan of a run."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from store.datasets import DatasetFiles
from store.job_records import DatasetRecord, JobRecord
from store.jobs import JobStore
from trainer.data_limits import unservable
from trainer.device_queue import DeviceQueue
from trainer.devices import Device, device_facts, usable_bytes
from trainer.errors import InitFromUnusable, TrainingUnavailable, UnservableAdapter
from trainer.job_folder import JobFolder
from trainer.journal import Journal
from trainer.lender import Lender, LendsNothing
from trainer.preparation import Prepared
from trainer.publisher import Publisher
from trainer.recovery import recovery_of
from trainer.run_folder import RunFolder, RunPlan
from trainer.served import ServedModel
from trainer.spec import DatasetFormat, DataSpec, JobSpec
from trainer.watchdog import DEFAULT_TIMEOUT_S

DATA_PATH = "spec.data"
"""Of a job's DataSpec in the request."""

AGAIN = "create the job again"


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
    lender: Lender = field(default_factory=LendsNothing)
    """Of devices on which something serves."""
    stall_timeout_s: float = DEFAULT_TIMEOUT_S
    """How long a training process may not get on; see `trainer/watchdog.py`."""
    clock_ns: Callable[[], int] = time.time_ns
    """Tells the time, in nanoseconds since the epoch."""

    def require_trainable(self, job: JobRecord) -> None:
        """Raise unless what is served is still what the job was made for.

        The gateway may have been started again meanwhile, with another base model or tighter
        limits: the job would be trained for hours, and refused at the end. Raises
        TrainingUnavailable and UnservableAdapter.
        """
        spec = JobSpec.model_validate(job.effective_spec)
        if spec.base_model != self.served.name:
            raise TrainingUnavailable(
                f"the job was created for base model {spec.base_model!r}, and "
                f"{self.served.name!r} is served now: create it again for that one, or have the "
                f"operator start the gateway with --model {spec.base_model}"
            )
        if changed := differing(job.fingerprints, self.served.fingerprints):
            raise TrainingUnavailable(
                f"the job was created for other files of base model {spec.base_model!r} than are "
                f"served now ({', '.join(changed)} changed): create it again, or have the operator "
                "put the earlier ones back"
            )
        self.require_servable(spec)

    def require_servable(self, spec: JobSpec) -> None:
        """Raise UnservableAdapter, with all findings, for a resolved spec of an adapter that the
        server could not serve."""
        found = list(self.publisher.findings(spec))
        told = {finding.field for finding in found}
        limits = unservable(spec.data, DATA_PATH, self.served.max_model_len)
        found += [finding for finding in limits if finding.field not in told]
        if found:
            raise UnservableAdapter(found)

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

        Raises DatasetInvalid, InitFromUnusable, or TrainingUnavailable if the device does not
        answer.
        """
        resume = self._resumed(job)
        initial = "" if resume else await asyncio.to_thread(self._initial, job)
        rows = await self.rows(job)
        facts = await asyncio.to_thread(device_facts, device)
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
            memory_bytes=usable_bytes(facts, on_gpu=device.on_gpu),
            resume=resume,
            initial_weights=initial,
        )

    def _initial(self, job: JobRecord) -> str:
        init_from = JobSpec.model_validate(job.effective_spec).init_from
        if init_from is None:
            return ""
        held = JobFolder(self.folder / job.uid).initial_weights
        if not held.is_file():
            raise InitFromUnusable(init_from.text, "was kept with the job, and is gone: " + AGAIN)
        return str(held)

    def _resumed(self, job: JobRecord) -> str:
        checkpoint = recovery_of(job).resumed_from
        return "" if checkpoint is None else str(self.folder / job.uid / checkpoint.folder)


def differing(ours: Mapping[str, str], theirs: Mapping[str, str]) -> list[str]:
    """Names under which two mappings do not have the same."""
    return sorted(
        name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)
    )
