"""One job, from where it stands to its end.

    VALIDATING  its dataset is prepared           QUEUED    waits for a device
    PREPARING, RUNNING  an attempt is followed    FINALIZING  its adapter is published
    CANCELLING  its attempt is ended

Each step reads where the job stands in the store and ends with a change there, which fails if
somebody else changed it. So a step may be cut off anywhere, and done again by the next start.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from pathlib import Path

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
from trainer.attempt import Attempt, RunUnattached
from trainer.devices import Device
from trainer.ending import Finished
from trainer.environment import training_environment
from trainer.errors import TrainingError, TrainingUnavailable
from trainer.events import JobFailure, Manifest, Publication, PublicationState
from trainer.failure import is_storage_full, storage_full
from trainer.ingest import as_json
from trainer.job_folder import JobFolder
from trainer.journal import HAS_PROCESS
from trainer.means import Means
from trainer.refusal import refused, unforeseen
from trainer.spec import JobSpec

logger = logging.getLogger(__name__)

TRIES = 10
"""How often a step is tried that fails for a reason that nobody foresaw."""
RETRY_S, MAX_RETRY_S = 1.0, 30.0
"""After which it is tried again: twice as long each time, up to the most."""

PUBLISHED = {PublicationState.SERVING, PublicationState.REJECTED, PublicationState.FAILED}


class JobRun:
    """Owned by `Jobs`; `run` is its task, and lets go of all it holds when it is cancelled."""

    def __init__(self, job: JobRecord, means: Means) -> None:
        self._job = job
        self._means = means
        self._folder = JobFolder(means.folder / job.uid)
        self._cancelled = asyncio.Event()
        self._attempt: Attempt | None = None
        self._device: Device | None = None
        self._published: Publication | None = None
        """What became of the adapter, if the store may not know it yet."""

    async def recover(self) -> None:
        """Find the process that a gateway before this one left, and hold its device.

        Raises OSError if it cannot be told whether there is one. The device is held then, until
        a later run of the job can tell.
        """
        job, queue = self._job, self._means.queue
        if job.state not in HAS_PROCESS or not job.attempt:
            return
        # As the store has it, and not the plan, which another release may have written.
        device = queue.hold(job.device, job.uid)
        self._attempt = self._new_attempt(job.attempt)
        if await self._attempt.find():
            self._device = device
        else:
            queue.give_back(device, job.uid)

    def cancel(self) -> None:
        """Say that the job is CANCELLING by now."""
        self._cancelled.set()

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
            self._let_go()
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
        if self._job.state is JobState.CANCELLING or not (full or troubles >= TRIES):
            await self._pause(troubles)
            return
        try:
            if self._attempt is not None and await self._attempt.goes_on():
                await self._pause(troubles)
                return
            if self._attempt is not None and isinstance(error, RunUnattached):
                await self._attempt.end()  # what is left of it: it can be judged now
                await self._judge(self._attempt)
                return
            await self._end_attempt()
            await self._fail(storage_full() if full else unforeseen(error, self._job.attempt))
        except Exception:
            logger.exception("job %s cannot be failed; trying again", self._job.name)
            await self._pause(troubles)

    async def _pause(self, troubles: int) -> None:
        """Before the next try; a cancel is heard at once."""
        pause_s = min(RETRY_S * 2 ** min(troubles - 1, 10), MAX_RETRY_S)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._cancelled.wait(), pause_s)
        self._cancelled.clear()

    async def _advance(self) -> None:
        """One step. Cut off when the job is cancelled."""
        if self._job.state is JobState.CANCELLING:
            await self._end()
            return
        if self._job.intent is not Intent.RUN:  # a crash came between the wish and its change
            await self._change(JobChange(state=JobState.CANCELLING))
            return
        step = asyncio.create_task(self._step())
        cancelled = asyncio.create_task(self._cancelled.wait())
        try:
            await asyncio.wait({step, cancelled}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            step.cancel()
            cancelled.cancel()
            await asyncio.wait({step, cancelled})
        self._cancelled.clear()
        if not step.cancelled():
            step.result()

    async def _step(self) -> None:
        match self._job.state:
            case JobState.VALIDATING:
                await self._validate()
            case JobState.QUEUED:
                await self._begin()
            case JobState.PREPARING | JobState.RUNNING:
                await self._follow()
            case _:
                await self._publish()

    # --- before the process -------------------------------------------------

    async def _validate(self) -> None:
        try:
            self._means.require_trainable(self._job)
            await self._means.rows(self._job)
        except TrainingError as error:
            await self._fail(refused(error, self._job.attempt))
        else:
            await self._change(JobChange(state=JobState.QUEUED))

    async def _begin(self) -> None:
        """Wait for a device, and start an attempt on it."""
        try:
            self._means.require_trainable(self._job)
            if self._device is None:
                self._device = await self._means.queue.take(self._job.uid, self._job.create_time_ns)
        except TrainingError as error:
            await self._fail(refused(error, self._job.attempt))
            return
        number, device = self._job.attempt + 1, self._device.name
        await self._change(JobChange(state=JobState.PREPARING, attempt=number, device=device))

    async def _start(self, attempt: Attempt) -> None:
        """Start the process of the attempt that the store knows of."""
        means, job = self._means, self._job
        means.require_trainable(job)
        if self._device is None:  # it was to be started, and the gateway ended
            self._device = await means.queue.take(job.uid, job.create_time_ns)
        if job.device != self._device.name:
            await self._change(JobChange(device=self._device.name))
            job = self._job
        plan = await means.plan(job, self._device)
        run = self._folder.run(job.attempt)
        environment = training_environment(means.environment, run, self._device.name)
        try:
            await attempt.start(plan, means.command(run), environment)
        except OSError as error:
            if is_storage_full(error):
                raise
            raise TrainingUnavailable(
                f"the training process does not start ({error.strerror}): tell the operator"
            ) from error
        logger.info("job %s: attempt %d on %s", job.name, job.attempt, self._device.name)

    # --- with the process ---------------------------------------------------

    async def _follow(self) -> None:
        """Take in what the attempt says until it ends, and decide what follows."""
        if self._attempt is None:
            self._attempt = self._new_attempt(self._job.attempt)
        if self._job.state is JobState.PREPARING and not self._attempt.was_started:
            try:
                await self._start(self._attempt)
            except TrainingError as error:
                await self._end_attempt()
                await self._fail(refused(error, self._job.attempt))
                return
        await self._attempt.attach()
        self._job = await self._attempt.follow(self._job)
        await self._judge(self._attempt)

    async def _judge(self, attempt: Attempt) -> None:
        """Decide what becomes of a job whose attempt has ended."""
        how = await attempt.ending()
        await self._end_attempt()
        if not isinstance(how, Finished):
            await self._fail(how.failure)
            return
        if self._job.state is JobState.PREPARING:  # it said so in a line that could not be read
            await self._change(JobChange(state=JobState.RUNNING))
        await self._change(JobChange(state=JobState.FINALIZING, manifest=as_json(how.manifest)))

    async def _end_attempt(self) -> None:
        """Leave no process, and the device to the next job."""
        if self._attempt is not None:
            await self._attempt.end()
        self._let_go()

    def _let_go(self) -> None:
        if self._attempt is not None:
            self._attempt.close()
            self._attempt = None
        if self._device is not None:
            self._means.queue.give_back(self._device, self._job.uid)
            self._device = None

    # --- after the process --------------------------------------------------

    async def _publish(self) -> None:
        """Publish what is trained. Whatever comes of it, the job has succeeded."""
        publish = self._effective_spec.publish
        publication = Publication.model_validate(self._job.publication)
        if publish is not None and publication.state not in PUBLISHED:
            await self._tell(publication.model_copy(update={"state": PublicationState.GATING}))
            assert self._job.manifest is not None
            checkpoint = Manifest.model_validate(self._job.manifest).checkpoint
            folder = await asyncio.to_thread(self._folder.checkpoint, checkpoint)
            if folder is None:
                publication = _unpublished(self._job, "its checkpoint is gone or damaged")
            else:
                self._published = publication = await self._try_to_publish(folder)
            await self._tell(publication)
        await self._change(JobChange(state=JobState.SUCCEEDED))

    async def _try_to_publish(self, folder: Path) -> Publication:
        publish = self._effective_spec.publish
        assert publish is not None
        try:
            return await self._means.publisher.publish(
                self._job, folder, self._job.adapter, publish
            )
        except Exception:
            logger.exception("job %s cannot be published", self._job.name)
            return _unpublished(self._job, "the gateway failed to publish it, and logged why")

    async def _tell(self, publication: Publication) -> None:
        told = as_json(publication)
        await self._change(
            JobChange(publication=told, events=[NewEvent(EventKind.PUBLICATION, told)])
        )

    async def _end(self) -> None:
        """End what runs of a cancelled job, and keep or drop what it saved."""
        number = self._job.attempt
        if number:
            if self._attempt is None:
                self._attempt = self._new_attempt(number)
            grace_s = self._effective_spec.cancel_grace_s or 0.0
            await self._attempt.find()  # else it would be killed, and not asked to save
            save = self._job.intent is not Intent.DISCARD
            self._job = await self._attempt.stop(self._job, save=save, grace_s=grace_s)
            await self._attempt.end()
            self._job = await self._attempt.follow(self._job)  # what it said at last
        self._let_go()
        self._job = await self._look()
        if number and self._job.intent is Intent.DISCARD:
            await asyncio.to_thread(self._folder.drop_checkpoints, number)
        publication = Publication.model_validate(self._job.publication)
        if publication.state is PublicationState.GATING:
            await self._tell(self._published or _unpublished(self._job, "the job was cancelled"))
        await self._change(JobChange(state=JobState.CANCELLED))

    # --- the store ----------------------------------------------------------

    async def _change(self, change: JobChange) -> None:
        self._job = await self._means.journal.change(self._job, change)

    async def _fail(self, failure: JobFailure) -> None:
        logger.warning("job %s: %s: %s", self._job.name, failure.reason.name, failure.message)
        self._let_go()
        await self._change(JobChange(state=JobState.FAILED, error=as_json(failure)))

    @property
    def _effective_spec(self) -> JobSpec:
        return JobSpec.model_validate(self._job.effective_spec)

    def _new_attempt(self, number: int) -> Attempt:
        return Attempt(self._folder.run(number), self._means.journal)


def _how_far(job: JobRecord) -> tuple[int, int]:
    """What grows while a job gets on. Not its events: a step tells some before it fails."""
    return job.epoch, job.ingested_bytes


def _unpublished(job: JobRecord, why: str) -> Publication:
    """The publication of an adapter that could not be published."""
    return Publication(
        state=PublicationState.FAILED,
        adapter=job.adapter,
        reasons=(f"{why}; PublishCheckpoint tries again",),
    )
