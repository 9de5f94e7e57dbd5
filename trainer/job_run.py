"""One job, from where it stands to its end.

    VALIDATING  its dataset is prepared           QUEUED      waits for a device
    PREPARING, RUNNING  an attempt is followed    RECOVERING  waits for its next attempt
    PAUSING     its attempt is ended for now      PAUSED      waits to be resumed
    FINALIZING  its adapter is published          CANCELLING  its attempt is ended for good

Each step reads where the job stands in the store and ends with a change there, which fails if
somebody else changed it. So a step may be cut off anywhere, and done again by the next start.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging

from store.job_records import (
    EventKind,
    Intent,
    JobChange,
    JobChanged,
    JobRecord,
    JobState,
    JobUnknown,
    NewEvent,
)
from store.upload_folder import DatabaseFull
from trainer.attempt import RunUnattached
from trainer.errors import TrainingError
from trainer.events import Notice
from trainer.failure import is_storage_full, storage_full
from trainer.ingest import as_json
from trainer.job_folder import JobFolder
from trainer.job_process import JobProcess
from trainer.job_publishing import JobPublishing
from trainer.means import Means
from trainer.refusal import refused, unforeseen
from trainer.spec import JobSpec
from trainer.wishes import PAUSE

logger = logging.getLogger(__name__)

DEVICE_RECALLED = Notice(
    code="DEVICE_RECALLED",
    message="the engine needs the device that it had lent: the run saves, and goes on when it may "
    "borrow the device again",
)
TRIES = 10
"""How often a step is tried that fails for a reason that nobody foresaw."""
RETRY_S, MAX_RETRY_S = 1.0, 30.0
"""After which it is tried again: twice as long each time, up to the most."""


class JobRun:
    """Owned by `Jobs`; `run` is its task, and lets go of all it holds when it is cancelled."""

    def __init__(self, job: JobRecord, means: Means) -> None:
        self._job = job
        self._means = means
        self._folder = JobFolder(means.folder / job.uid)
        self._process = JobProcess(job.uid, means, self._recall)
        self._publishing = JobPublishing(job.uid, means)
        self._wished = asyncio.Event()
        self._recalled = False
        """Whether the lender of its device wants it back."""

    async def find(self) -> None:
        """Find the process that a gateway before this one left, and hold its device.

        Raises OSError if it cannot be told whether there is one. The device is held then, until
        a later run of the job can tell.
        """
        await self._process.find(self._job)

    def wake(self) -> None:
        """Say that something else is wanted of the job by now."""
        self._wished.set()

    def _recall(self) -> None:
        self._recalled = True
        self.wake()

    async def run(self) -> None:
        """Bring the job to its end."""
        troubles = 0
        try:
            # First: it may have been cancelled when nobody could say so to us.
            self._job = await self._look()
            while not self._job.state.is_final:
                before = _how_far(self._job)
                error: Exception | None = None
                try:
                    await self._advance()
                except JobChanged:
                    pass
                except Exception as raised:
                    error = raised
                self._job = await self._look()
                if _how_far(self._job) != before:
                    troubles = 0
                if error is not None and not self._job.state.is_final:
                    troubles += 1
                    await self._trouble(error, troubles)
                    self._job = await self._look()  # it may have been cancelled meanwhile
        except JobUnknown:
            logger.info("job %s was deleted", self._job.name)
            return
        finally:
            self._process.let_go()
        logger.info("job %s is %s", self._job.name, self._job.state.name)

    async def _look(self) -> JobRecord:
        """The job as it stands. Raises JobUnknown if it was deleted; its name may be another's."""
        while True:
            try:
                found = await self._means.store.job(self._job.tenant, self._job.name)
            except JobUnknown:
                raise
            except Exception:
                logger.exception("job %s cannot be read; trying again", self._job.name)
                await asyncio.sleep(RETRY_S)
            else:
                if found.uid != self._job.uid:
                    raise JobUnknown(self._job.name)
                return found

    async def _trouble(self, error: Exception, troubles: int) -> None:
        """A step failed, so many times in a row. Nobody else may be hurt by it, and the job has
        to end some time; but a process that trains is not ended because we fail to follow it."""
        logger.error("job %s, %s", self._job.name, self._job.state.name, exc_info=error)
        full = is_storage_full(error)
        # Where the database has no room, nothing happened to the job, nor can its end be written.
        waits = self._job.state is JobState.CANCELLING or isinstance(error, DatabaseFull)
        if waits or not (full or troubles >= TRIES):
            await self._rest(troubles)
            return
        try:
            if await self._process.goes_on():
                await self._rest(troubles)
                return
            attached = self._process.attached
            await self._process.end()
            if attached and isinstance(error, RunUnattached):
                await self._process.judge(self._job)  # what was left of it is gone now
                return
            failure = storage_full() if full else unforeseen(error, self._job.attempt)
            await self._process.fail(self._job, failure)
        except Exception:
            logger.exception("job %s cannot be failed; trying again", self._job.name)
            await self._rest(troubles)

    async def _rest(self, troubles: int) -> None:
        """Before the next try; a wish is heard at once."""
        pause_s = min(RETRY_S * 2 ** min(troubles - 1, 10), MAX_RETRY_S)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._wished.wait(), pause_s)
        self._wished.clear()

    async def _advance(self) -> None:
        """One step. Cut off when something else is wanted of the job."""
        job = self._job
        if job.state is JobState.CANCELLING:
            await self._cancel(job)
            return
        # A crash may have come between a wish and its change, or the state could not follow then.
        if job.intent.ends:
            await self._change(JobChange(state=JobState.CANCELLING))
            return
        if job.intent is Intent.PAUSE and job.state in PAUSE:
            await self._change(JobChange(state=PAUSE[job.state]))
            return
        if job.intent is Intent.RUN and job.state is JobState.PAUSED:
            await self._change(JobChange(state=JobState.QUEUED))
            return
        if self._recalled:
            self._recalled = False
            if job.state in (JobState.PREPARING, JobState.RUNNING):
                # Nobody wants it to rest: it is queued again as soon as it is PAUSED.
                events = [NewEvent(EventKind.NOTICE, as_json(DEVICE_RECALLED))]
                await self._change(JobChange(state=JobState.PAUSING, events=events))
                return
            if job.state is JobState.QUEUED:  # it has the device, and nothing runs there yet
                self._process.let_go()
        step = asyncio.create_task(self._step(job))
        wished = asyncio.create_task(self._wished.wait())
        try:
            await asyncio.wait({step, wished}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            step.cancel()
            wished.cancel()
            await asyncio.wait({step, wished})
        self._wished.clear()
        if not step.cancelled():
            step.result()

    async def _step(self, job: JobRecord) -> None:
        match job.state:
            case JobState.VALIDATING:
                await self._validate(job)
            case JobState.QUEUED:
                await self._process.begin(job)
            case JobState.PREPARING | JobState.RUNNING:
                await self._process.follow(job)
            case JobState.PAUSING:
                await self._process.pause(job)
            case JobState.PAUSED:
                self._process.let_go()  # a device that it was given as it was paused
                self._job = await self._process.tell_outage(job)
                await asyncio.Event().wait()
            case JobState.RECOVERING:
                await self._process.wait_and_queue(job)
            case _:
                self._job = await self._process.tell_outage(job)
                await self._publish()
                await self._change(JobChange(state=JobState.SUCCEEDED))

    async def _publish(self) -> None:
        if JobSpec.model_validate(self._job.effective_spec).publish is None:
            return
        async with self._means.lender.serving():
            self._job = await self._publishing.publish(self._job)

    async def _validate(self, job: JobRecord) -> None:
        try:
            self._means.require_trainable(job)
            await self._means.rows(job)
        except TrainingError as error:
            await self._process.fail(job, refused(error, job.attempt))
        else:
            await self._change(JobChange(state=JobState.QUEUED))

    async def _cancel(self, job: JobRecord) -> None:
        """End what runs of a cancelled job, and keep or drop what it saved."""
        await self._process.stop(job)
        self._job = job = await self._look()
        if job.attempt and job.intent is Intent.DISCARD:
            await asyncio.to_thread(self._folder.drop_checkpoints, job.attempt)
        self._job = await self._publishing.give_up(job)
        await self._change(JobChange(state=JobState.CANCELLED))

    async def _change(self, change: JobChange) -> None:
        self._job = await self._means.journal.change(self._job, change)


def _how_far(job: JobRecord) -> tuple[int, int]:
    """What grows while a job gets on. Not its events: a step tells some before it fails."""
    return job.epoch, job.ingested_bytes
