"""Whether a job can be run here, before anything is spent on it; and what it would cost."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

from store.job_records import DatasetRecord, JobRecord, JobState
from trainer.capabilities import Capabilities, Installed, installed_for
from trainer.data_limits import contradictions
from trainer.devices import Device, DeviceFacts, device_facts
from trainer.environment import without_secrets
from trainer.errors import (
    BaseModelUnknown,
    InvalidSpec,
    TrainingUnavailable,
)
from trainer.estimate import Estimate, Price, estimate, pace_of
from trainer.events import Progress
from trainer.footprint import WIDTH_BYTES
from trainer.means import DATA_PATH, Means
from trainer.model_size import ModelSize, model_size
from trainer.origins import Origins
from trainer.publisher import Finding
from trainer.recovery import too_large
from trainer.spec import DatasetFormat, JobSpec, Precision

LENT_SHARE = 0.9
"""Of a GPU's memory that an engine leaves which lends it; it keeps graphs and libraries."""
MEASURED_RUNS = 20
"""Newest jobs that are looked at for how fast such jobs run here."""


class Admission:
    """What this gateway trains. Asks devices, libraries and the base model once."""

    def __init__(
        self,
        means: Means,
        origins: Origins,
        devices: Sequence[Device],
        *,
        python: str,
        price: Price | None,
    ) -> None:
        self._means = means
        self._origins = origins
        self._devices = tuple(devices)
        self._python = python
        self._price = price
        self._asking = asyncio.Lock()
        self._installed: Installed | None = None
        self._size: ModelSize | None = None
        self._bfloat16: bool | None = None

    async def capabilities(self) -> Capabilities:
        """What can be trained here. Raises TrainingUnavailable if that cannot be told."""
        installed = await self._look_up()
        return Capabilities(
            backends=installed.backends,
            devices=tuple(device.name for device in self._devices),
            versions=installed.versions,
            bfloat16=bool(self._devices) and await self._has_bfloat16(),
        )

    async def resolve(self, tenant: str, spec: JobSpec) -> JobSpec:
        """The spec with every field set.

        Raises DatasetUnknown, TrainingUnavailable, BaseModelUnknown, InvalidSpec,
        UnservableAdapter, and what `Origins.begun_with` raises.
        """
        served = self._means.served
        if spec.base_model not in ("", served.name):
            raise BaseModelUnknown(spec.base_model, served.name)
        if not self._devices:
            raise TrainingUnavailable(
                "this gateway has no device to train on: its operator names one with "
                "--training-devices"
            )
        backends = (await self._look_up()).backends
        if spec.backend is not None and spec.backend not in backends:
            there = ", ".join(backend.name for backend in backends) or "none"
            raise TrainingUnavailable(
                f"backend {spec.backend.name} is not installed here; there is: {there}"
            )
        if not backends:
            raise TrainingUnavailable(
                "no backend is installed: the operator installs lora-gateway[train], or names an "
                "interpreter that has it"
            )
        dataset = await self._dataset(tenant, spec)
        spec = await self._origins.begun_with(tenant, spec)
        on_gpu, bfloat16 = self._devices[0].on_gpu, await self._has_bfloat16()
        resolved = spec.resolved(
            base_model=served.name,
            max_model_len=served.max_model_len,
            served_dtype=served.dtype,
            backend=backends[0],
            on_gpu=on_gpu,
            bfloat16=bfloat16,
            format=DatasetFormat(dataset.format) if dataset.format else None,
        )
        wrong = list(contradictions(resolved.data, DATA_PATH))
        if resolved.hyperparameters.precision is Precision.BFLOAT16 and not bfloat16:
            wrong.append(
                Finding("spec.hyperparameters.precision", "no bfloat16 here: take FLOAT32")
            )
        if wrong:
            raise InvalidSpec(*wrong)
        self._means.require_servable(resolved)
        return resolved

    async def _dataset(self, tenant: str, spec: JobSpec) -> DatasetRecord:
        dataset = await self._means.store.dataset(tenant, spec.dataset)
        if spec.data.eval_dataset:
            await self._means.store.dataset(tenant, spec.data.eval_dataset)
        return dataset

    async def estimate(self, tenant: str, spec: JobSpec) -> Estimate:
        """What it would cost. Raises as `resolve` does, and DatasetInvalid."""
        resolved = await self.resolve(tenant, spec)
        rows = await self._means.rows_of(tenant, spec, resolved)
        device, served = self._devices[0], self._means.served
        if self._size is None:
            self._size = await asyncio.to_thread(model_size, served.path)
        alike = await self._alike(tenant, resolved)
        found = estimate(
            resolved,
            rows.prepared.report,
            self._size,
            await self._facts_of_a_run(device),
            on_gpu=device.on_gpu,
            served_width_bytes=4 if served.dtype == "float32" else WIDTH_BYTES[Precision.BFLOAT16],
            max_model_len=served.max_model_len,
            max_lora_rank=served.max_lora_rank,
            # The time of one that paused or was lost is not all its own.
            pace=pace_of([_run(job) for job in alike if job.attempt == 1]),
            price=self._price,
        )
        warnings = [*found.warnings, *too_large(alike, resolved)]
        if self._means.lender.lends(device):
            warnings.append(
                f"an engine lends device {device.name} for as long as the job trains: its callers "
                "are refused meanwhile, or served by another one"
            )
        return replace(found, warnings=tuple(warnings))

    async def _facts_of_a_run(self, device: Device) -> DeviceFacts:
        """What the device will have when a job has it: an engine that lends it is there now."""
        facts = await self._facts(device)
        if not (device.on_gpu and self._means.lender.lends(device)):
            return facts
        left_bytes = int(LENT_SHARE * facts.memory_bytes)
        return replace(facts, memory_available_bytes=max(left_bytes, facts.memory_available_bytes))

    async def _alike(self, tenant: str, spec: JobSpec) -> list[JobRecord]:
        """Jobs that ran and are like it: of this model, backend and precision. Newest first."""
        jobs = await self._means.store.jobs(
            tenant, limit=MEASURED_RUNS, states=[JobState.SUCCEEDED]
        )
        return [job for job in jobs if _alike(job, spec)]

    async def _look_up(self) -> Installed:
        async with self._asking:
            if self._installed is None:
                self._installed = await installed_for(
                    self._python, without_secrets(self._means.environment)
                )
            return self._installed

    async def _has_bfloat16(self) -> bool:
        if self._bfloat16 is None:
            facts = [await self._facts(device) for device in self._devices]
            self._bfloat16 = all(fact.bfloat16 for fact in facts)
        return self._bfloat16

    async def _facts(self, device: Device) -> DeviceFacts:
        return await asyncio.to_thread(device_facts, device)


def _alike(job: JobRecord, spec: JobSpec) -> bool:
    """Whether a job that ran says how fast this one would."""
    ran = JobSpec.model_validate(job.effective_spec)
    ours, theirs = spec.hyperparameters, ran.hyperparameters
    return (
        job.progress is not None
        and ran.base_model == spec.base_model
        and ran.backend is spec.backend
        and theirs.quantization is ours.quantization
        and theirs.precision is ours.precision
    )


def _run(job: JobRecord) -> tuple[int, float, float]:
    """Tokens that a job saw, seconds of its steps, and seconds of the rest."""
    progress = Progress.model_validate(job.progress)
    started_ns, ended_ns = job.start_time_ns or 0, job.end_time_ns or 0
    rest_s = max(0.0, (ended_ns - started_ns) / 1e9 - progress.elapsed_s)
    return progress.tokens_seen, progress.elapsed_s, rest_s
