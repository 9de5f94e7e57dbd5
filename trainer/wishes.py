"""What owners want of their jobs: to pause, to go on, to end."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from store.job_records import Intent, JobChange, JobChanged, JobRecord, JobState
from store.jobs import JobStore
from trainer.errors import JobNotPausable, JobNotResumable
from trainer.journal import Journal

PAUSE: Mapping[JobState, JobState] = {
    JobState.QUEUED: JobState.PAUSED,
    JobState.PREPARING: JobState.PAUSING,
    JobState.RUNNING: JobState.PAUSING,
    JobState.RECOVERING: JobState.PAUSED,
}
"""Where a job goes that is to be paused. One that is VALIDATING is queued first."""


class Wishes:
    """Writes down what is wanted, and moves the job at once as far as that goes."""

    def __init__(self, store: JobStore, journal: Journal, wake: Callable[[str], None]) -> None:
        """`wake` tells the run of a job, by uid, that something else is wanted."""
        self._store = store
        self._journal = journal
        self._wake = wake

    async def cancel(self, tenant: str, name: str, *, discard: bool) -> JobRecord:
        """The job, which is CANCELLING or has ended. Raises JobUnknown."""
        intent = Intent.DISCARD if discard else Intent.CANCEL
        job = await self._store.intend(tenant, name, intent)
        job = await self._journal.move(job, JobChange(state=JobState.CANCELLING))
        self._wake(job.uid)
        return job

    async def pause(self, tenant: str, name: str) -> JobRecord:
        """The job, which is PAUSING, PAUSED, or VALIDATING and to be paused.

        Raises JobUnknown and JobNotPausable.
        """
        while True:
            job = await self._store.job(tenant, name)
            if job.state is JobState.FINALIZING or _ends(job):
                raise JobNotPausable(job.name, job.state)
            if job.intent is Intent.PAUSE:
                return job
            if (changed := await self._change(job, PAUSE.get(job.state), Intent.PAUSE)) is not None:
                return changed

    async def resume(self, tenant: str, name: str) -> JobRecord:
        """The job, which is to go on. Raises JobUnknown and JobNotResumable."""
        while True:
            job = await self._store.job(tenant, name)
            if _ends(job):
                raise JobNotResumable(job.name, job.state)
            if job.intent is Intent.RUN:
                return job
            state = JobState.QUEUED if job.state is JobState.PAUSED else None
            if (changed := await self._change(job, state, Intent.RUN)) is not None:
                return changed

    async def _change(
        self, job: JobRecord, state: JobState | None, intent: Intent
    ) -> JobRecord | None:
        """The job as it is then; None: it changed meanwhile."""
        try:
            changed = await self._journal.change(job, JobChange(state=state, intent=intent))
        except JobChanged:
            return None
        if state is not None:  # else what it does goes on: nobody is to be disturbed
            self._wake(job.uid)
        return changed


def _ends(job: JobRecord) -> bool:
    return job.state.is_final or job.intent.ends
