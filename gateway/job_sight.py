"""Training jobs and their loss curves, for the status page: read from the store as they grow."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from gateway.loss_curve import LossCurve
from gateway.status import JobStatus
from gateway.words import for_people
from store.job_records import EventKind, JobEventRecord, JobRecord, JobState, JobUnknown
from store.jobs import JobStore

ACTIVE_SHOWN = 10
ENDED_SHOWN = 5
EVENTS_PER_READ = 2000
"""Of each job, a second. A long curve that nobody has looked at yet comes in a few parts."""

_ACTIVE = [state for state in JobState if not state.is_final]
_ENDED = [state for state in JobState if state.is_final]
_HAS_ETA = frozenset({JobState.RUNNING})
_TOLD_PUBLICATIONS = frozenset({"gating", "rejected", "serving", "failed"})


class JobSights(Protocol):
    """What is looked at."""

    @property
    def jobs(self) -> JobStore: ...

    @property
    def queue_position(self) -> Callable[[JobRecord], int]:
        """Tells from 1 for the job that is next; 0 for one that is not QUEUED."""


class _Curves:
    """The curves of one job, up to one of its events."""

    def __init__(self) -> None:
        self.sequence = 0
        self.loss = LossCurve()
        self.eval_loss = LossCurve()

    def add(self, event: JobEventRecord) -> None:
        self.sequence = event.sequence
        step = event.payload["step"]
        for name, curve in (("loss", self.loss), ("eval_loss", self.eval_loss)):
            if (value := event.payload.get(name)) is not None:
                curve.add(step, value)


class JobSight:
    """Reads jobs. Remembers the curves of those that it showed last."""

    def __init__(self) -> None:
        self._curves: dict[str, _Curves] = {}
        """By uid."""

    async def read(self, sights: JobSights, tenant: str) -> tuple[list[JobStatus], int]:
        """The newest jobs, those that have not ended first; and how many have not ended."""
        store = sights.jobs
        active = await store.jobs(tenant, limit=ACTIVE_SHOWN, states=_ACTIVE)
        ended = await store.jobs(tenant, limit=ENDED_SHOWN, states=_ENDED)
        count = sum(key.tenant == tenant for key in await store.active_jobs())
        jobs = [*active, *ended]
        before = self._curves
        self._curves = {job.uid: before.get(job.uid) or _Curves() for job in jobs}
        for job in jobs:
            await self._follow(store, job)
        return [
            _status(job, sights.queue_position(job), self._curves[job.uid]) for job in jobs
        ], count

    async def _follow(self, store: JobStore, job: JobRecord) -> None:
        curves = self._curves[job.uid]
        if curves.sequence >= job.last_sequence:
            return
        try:
            events = await store.job_events(
                *(job.tenant, job.name),
                after=curves.sequence,
                limit=EVENTS_PER_READ,
                uid=job.uid,
                kinds=[EventKind.PROGRESS],
            )
        except JobUnknown:  # deleted just now
            return
        for event in events:
            curves.add(event)
        if len(events) < EVENTS_PER_READ:
            curves.sequence = max(curves.sequence, job.last_sequence)


def _status(job: JobRecord, queue_position: int, curves: _Curves) -> JobStatus:
    progress: Mapping[str, Any] = job.progress or {}
    publication = str(job.publication.get("state", ""))
    eta_s = progress.get("eta_s") if job.state in _HAS_ETA else None
    return JobStatus(
        name=job.name,
        adapter=job.adapter,
        state=job.state.value,
        is_final=job.state.is_final,
        priority=job.priority,
        queue_position=queue_position,
        device=job.device,
        time_s=(job.end_time_ns or job.create_time_ns) / 1e9,
        step=progress.get("step", 0),
        total_steps=progress.get("total_steps", 0),
        epoch=progress.get("epoch", 0.0),
        loss=_finite(progress.get("loss")),
        eval_loss=_finite(progress.get("eval_loss")),
        tokens_per_s=progress.get("tokens_per_second", 0.0) if job.state in _HAS_ETA else 0.0,
        eta_s=_finite(eta_s),
        publication=publication if publication in _TOLD_PUBLICATIONS else "",
        message=for_people(str((job.error or {}).get("message", ""))),
        curve=curves.loss.points(),
        eval_curve=curves.eval_loss.points(),
    )


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
