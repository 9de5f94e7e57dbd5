"""The training processes of one job: an attempt is begun, followed, lost, and begun again.

Each step ends with a change in the store, which fails if somebody else changed the job. So it may
be cut off anywhere, and done again by the next start.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from store.job_records import (
    HAS_PROCESS,
    EventKind,
    Intent,
    JobChange,
    JobRecord,
    JobState,
    NewEvent,
)
from trainer.attempt import Attempt, RunHung
from trainer.checkpoint import remove_unfinished
from trainer.claim import Claim
from trainer.devices import Device
from trainer.ending import Ending, Finished, Lost, Stopped, lost
from trainer.environment import training_environment
from trainer.errors import TrainingError, TrainingUnavailable
from trainer.events import JobFailure, Notice
from trainer.failure import is_storage_full
from trainer.ingest import as_json
from trainer.job_folder import JobFolder
from trainer.means import Means
from trainer.reclaim import mark_borrowed
from trainer.recovery import MAX_BACKOFF_S, GiveUp, after_loss, recovery_of, resumed
from trainer.refusal import refused
from trainer.resume import newest_checkpoint
from trainer.spec import JobSpec
from trainer.watchdog import Watchdog

logger = logging.getLogger(__name__)


class JobProcess:
    """Owned by the run of the job, which calls `let_go`; a process goes on then."""

    def __init__(self, uid: str, means: Means, recall: Callable[[], None]) -> None:
        """`recall` is called when a device that was borrowed is wanted back."""
        self._uid = uid
        self._recall = recall
        self._means = means
        self._folder = JobFolder(means.folder / uid)
        self._attempt: Attempt | None = None
        self._watchdog = Watchdog(means.stall_timeout_s)
        self._device: Device | None = None
        self._ended: tuple[int, Ending] | None = None
        """The attempt that was judged last, and how: its process is not there to be asked again."""

    async def find(self, job: JobRecord) -> None:
        """Find the process that a gateway before this one left, and hold its device.

        Raises OSError if it cannot be told whether there is one. The device is held then, until
        a later run of the job can tell.
        """
        queue = self._means.queue
        if job.state not in HAS_PROCESS or not job.attempt:
            return
        # As the store has it, and not the plan, which another release may have written.
        device = queue.hold(job.device, Claim.of(job), job.device_time_ns)
        if await self._attempt_of(job).find():
            self._device = device
        else:
            queue.give_back(device, self._uid)

    # --- a new attempt ------------------------------------------------------

    async def begin(self, job: JobRecord) -> None:
        """Wait for a device, and begin an attempt on it, from the newest whole checkpoint."""
        try:
            self._means.require_trainable(job)
            if self._device is None:
                self._device = await self._means.queue.take(Claim.of(job))
            await self._borrow(job, self._device)
        except TrainingError as error:
            await self.fail(job, refused(error, job.attempt))
            return
        newest = await asyncio.to_thread(newest_checkpoint, self._folder, job.attempt)
        recovery, stands, notice = resumed(job, newest)
        change = JobChange(
            state=JobState.PREPARING,
            attempt=job.attempt + 1,
            device=self._device.name,
            recovery=as_json(recovery),
            progress=None if stands is None else as_json(stands),
            events=[] if notice is None else [NewEvent(EventKind.NOTICE, as_json(notice))],
        )
        await self._change(job, change)

    async def _borrow(self, job: JobRecord, device: Device) -> None:
        """Have nothing serve on the device, if something does that makes room."""

        async def tell(notice: Notice) -> None:
            notices = self._means.lender.outage(self._uid), notice
            events = [NewEvent(EventKind.NOTICE, as_json(each)) for each in notices if each]
            await self._means.journal.move(job, JobChange(events=events))

        await self._means.lender.borrow(device, self._uid, tell, self._recall)

    async def _start(self, job: JobRecord, attempt: Attempt) -> JobRecord:
        """Start the process of the attempt that the store knows of."""
        means = self._means
        means.require_trainable(job)
        if self._device is None:  # it was to be started, and the gateway ended
            self._device = await means.queue.take(Claim.of(job))
        await self._borrow(job, self._device)
        if job.device != self._device.name:
            job = await self._change(job, JobChange(device=self._device.name))
        plan = await means.plan(job, self._device)
        run = self._folder.run(job.attempt)
        environment = training_environment(means.environment, run, self._device.name)
        try:
            if means.lender.lends(self._device):
                await asyncio.to_thread(mark_borrowed, run)
            await attempt.start(plan, means.command(run), environment)
        except OSError as error:
            if is_storage_full(error):
                raise
            raise TrainingUnavailable(
                f"the training process does not start ({error.strerror}): tell the operator"
            ) from error
        logger.info("job %s: attempt %d on %s", job.name, job.attempt, self._device.name)
        return job

    # --- an attempt that runs -----------------------------------------------

    async def follow(self, job: JobRecord) -> None:
        """Take in what the attempt says until it ends, and decide what follows."""
        attempt = self._attempt_of(job)
        if job.state is JobState.PREPARING and not await attempt.was_started():
            try:
                job = await self._start(job, attempt)
            except TrainingError as error:
                await self.end()
                await self.fail(job, refused(error, job.attempt))
                return
        await attempt.attach()
        try:
            job = await attempt.follow(job, watchdog=self._watchdog)
        except RunHung as hung:
            logger.error("job %s: attempt %d: %s, and is ended", job.name, job.attempt, hung)
            job = await self._means.store.job(job.tenant, job.name)  # it got on until then
            job = await attempt.stop(job, save=True, grace_s=0.0)
            await attempt.end()
            await self.judge(await attempt.follow(job), hung.how)
        else:
            await self.judge(job)

    async def pause(self, job: JobRecord) -> None:
        """Have the process save and end, and rest; or see that it had ended before it heard."""
        job = await self._stop(job, save=True)
        how = await self._ending(job)
        if isinstance(how, Lost | Stopped):  # nothing has to follow now, so nothing counts
            self.let_go()
            await self._change(job, JobChange(state=JobState.PAUSED))
        else:
            await self.judge(job)

    async def stop(self, job: JobRecord) -> None:
        """End what runs of a job that is to end, and keep or drop what it saved."""
        if job.attempt:
            job = await self._stop(job, save=job.intent is not Intent.DISCARD)
        self.let_go()

    async def _stop(self, job: JobRecord, *, save: bool) -> JobRecord:
        attempt = self._attempt_of(job)
        grace_s = JobSpec.model_validate(job.effective_spec).cancel_grace_s or 0.0
        await attempt.find()  # else it would be killed, and not asked to save
        job = await attempt.stop(job, save=save, grace_s=grace_s)
        await attempt.end()
        # Of one that was killed as it saved.
        await asyncio.to_thread(remove_unfinished, self._folder.run(job.attempt))
        return await attempt.follow(job)  # what it said at last

    # --- an attempt that has ended ------------------------------------------

    async def judge(self, job: JobRecord, hung: str = "") -> None:
        """Decide what becomes of a job whose attempt has ended; in what way it `hung`, if it was
        ended for that."""
        how = await self._ending(job, hung)
        publish = JobSpec.model_validate(job.effective_spec).publish
        await self.end(publishes=isinstance(how, Finished) and publish is not None)
        if not isinstance(how, Finished):
            await self._lose(job, how.failure)
            return
        if job.state is JobState.PREPARING:  # it said so in a line that could not be read
            job = await self._change(job, JobChange(state=JobState.RUNNING))
        change = JobChange(state=JobState.FINALIZING, manifest=as_json(how.manifest))
        await self._change(job, change)

    async def _ending(self, job: JobRecord, hung: str = "") -> Ending:
        """How the attempt ended. The same each time: what comes of it may be tried again, where
        the database has no room, and the exit code is learned once."""
        if self._ended is not None and self._ended[0] == job.attempt:
            return self._ended[1]
        how = await self._attempt_of(job).ending()
        if hung and isinstance(how, Lost | Stopped):
            run = self._folder.run(job.attempt)
            how = await asyncio.to_thread(lost, run, hung, ", and was ended")
        self._ended = job.attempt, how
        return how

    async def _lose(self, job: JobRecord, failure: JobFailure) -> None:
        await asyncio.to_thread(remove_unfinished, self._folder.run(job.attempt))
        newest = await asyncio.to_thread(newest_checkpoint, self._folder, job.attempt)
        follows = after_loss(job, failure, newest, self._means.clock_ns())
        if isinstance(follows, GiveUp):
            await self.fail(job, follows.failure)
            return
        logger.warning("job %s: attempt %d: %s", job.name, job.attempt, failure.message)
        notices = [] if follows.notice is None else [as_json(follows.notice)]
        change = JobChange(
            state=JobState.RECOVERING,
            cause=as_json(failure),
            recovery=as_json(follows.recovery),
            effective_spec=None if follows.spec is None else as_json(follows.spec),
            notices=notices,
            events=[NewEvent(EventKind.NOTICE, notice) for notice in notices],
        )
        await self._change(job, change)

    async def wait_and_queue(self, job: JobRecord) -> None:
        """Queue a job that lost its attempt, once the time for that has come."""
        left_s = (recovery_of(job).retry_time_ns - self._means.clock_ns()) / 1e9
        await asyncio.sleep(min(max(0.0, left_s), MAX_BACKOFF_S))  # clocks are set back
        job = await self.tell_outage(job, wait=False)
        await self._change(job, JobChange(state=JobState.QUEUED))

    async def fail(self, job: JobRecord, failure: JobFailure) -> None:
        """End a job that cannot succeed, and leave its device to others."""
        logger.warning("job %s: %s: %s", job.name, failure.reason.name, failure.message)
        self.let_go()
        await self._change(job, JobChange(state=JobState.FAILED, error=as_json(failure)))

    # --- what is held -------------------------------------------------------

    @property
    def attached(self) -> bool:
        """Whether an attempt is looked at."""
        return self._attempt is not None

    async def goes_on(self) -> bool:
        """Whether a process of it runs, and has more to say. Raises OSError as `find` does."""
        return self._attempt is not None and await self._attempt.goes_on()

    async def end(self, *, publishes: bool = False) -> None:
        """Leave no process, and the device to the next job, or to the engine first if it
        `publishes`."""
        if self._attempt is not None:
            await self._attempt.end()
        self.let_go(publishes=publishes)

    def let_go(self, *, publishes: bool = False) -> None:
        """Look at no process any more, and hold no device."""
        if self._attempt is not None:
            self._attempt.close()
            self._attempt = None
        if self._device is not None:
            self._means.lender.give_back(self._device, self._uid, publishes=publishes)
            self._means.queue.give_back(self._device, self._uid)
            self._device = None

    async def tell_outage(self, job: JobRecord, *, wait: bool = True) -> JobRecord:
        """Tell what the job's last loan of a device cost, once it is over, or if it is."""
        if wait:
            await self._means.lender.returned(self._uid)
        notice = self._means.lender.outage(self._uid)
        if notice is None:
            return job
        events = [NewEvent(EventKind.NOTICE, as_json(notice))]
        return await self._change(job, JobChange(events=events))

    def _attempt_of(self, job: JobRecord) -> Attempt:
        if self._attempt is None:
            self._attempt = Attempt(self._folder.run(job.attempt), self._means.journal)
            self._watchdog = Watchdog(self._means.stall_timeout_s)
        return self._attempt

    async def _change(self, job: JobRecord, change: JobChange) -> JobRecord:
        return await self._means.journal.change(job, change)
