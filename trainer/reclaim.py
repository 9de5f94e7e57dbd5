"""What a gateway does before it serves: it takes devices back that were lent when the last ended.

A training process goes on when its gateway ends. If its device was lent, an engine is to start
there now, and there is no room for both. So the process is asked to save and to end, as for a
pause that nobody wished for: nothing is counted, and the job goes on as soon as it may borrow.
"""

from __future__ import annotations

import logging
from pathlib import Path

from store.job_records import (
    HAS_PROCESS,
    EventKind,
    Intent,
    JobChange,
    JobRecord,
    JobState,
    JobUnknown,
    NewEvent,
)
from store.jobs import JobStore
from trainer.attempt import Attempt
from trainer.events import Notice
from trainer.ingest import as_json
from trainer.job_folder import JobFolder
from trainer.journal import Journal
from trainer.run_folder import RunFolder
from trainer.spec import JobSpec

logger = logging.getLogger(__name__)

RECLAIMED = Notice(
    code="DEVICE_RECLAIMED",
    message="the gateway started again, and serves on the device that it had lent: the run saves, "
    "and goes on when it may borrow the device again",
)


def mark_borrowed(run: RunFolder) -> None:
    """Note that the run's device is lent, before its process is started. Raises OSError."""
    run.path.mkdir(parents=True, exist_ok=True)
    run.borrowed.touch()


async def reclaim(store: JobStore, folder: Path) -> int:
    """End all processes on devices that are lent; returns how many that were. `folder` has the
    folders of all jobs.

    A job that cannot be read, or a process that cannot be ended, is logged: an engine that finds
    no room says so itself.
    """
    journal = Journal(store, folder)
    ended = 0
    try:
        for key in await store.active_jobs():
            try:
                job = await store.job(*key)
                ended += await _reclaim(job, journal, folder)
            except JobUnknown:
                continue
            except Exception:
                logger.exception("the device of job %s cannot be taken back", key.job)
    finally:
        await journal.close()
    return ended


async def _reclaim(job: JobRecord, journal: Journal, folder: Path) -> bool:
    run = JobFolder(folder / job.uid).run(job.attempt)
    if job.state not in HAS_PROCESS or not job.attempt or not run.borrowed.exists():
        return False
    attempt = Attempt(run, journal)
    try:
        if not await attempt.find():
            return False  # it has ended, and what became of it is judged later
        logger.warning("job %s trains where an engine is to start: it saves, and waits", job.name)
        if job.state in (JobState.PREPARING, JobState.RUNNING):
            events = [NewEvent(EventKind.NOTICE, as_json(RECLAIMED))]
            job = await journal.change(job, JobChange(state=JobState.PAUSING, events=events))
        grace_s = JobSpec.model_validate(job.effective_spec).cancel_grace_s or 0.0
        await attempt.stop(job, save=job.intent is not Intent.DISCARD, grace_s=grace_s)
        await attempt.end()
        return True
    finally:
        attempt.close()
