"""Jobs on one host, as callers see them: create, watch, cancel, publish, delete.

    create -> a task that brings the job to its end (`trainer/job_run.py`) -> events -> watchers

The store decides what is true. Training processes go on when the gateway ends; the next one
finds them again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from pathlib import Path

from store.datasets import DatasetFiles
from store.job_records import (
    JobEventRecord,
    JobRecord,
    JobState,
    JobUnknown,
    NewJob,
)
from store.jobs import JobStore
from trainer.admission import Admission
from trainer.capabilities import Capabilities
from trainer.device_queue import DeviceQueue, unobserved
from trainer.devices import Device
from trainer.estimate import Estimate, Price
from trainer.events import Checkpoint, Publication, PublicationState
from trainer.ingest import as_json
from trainer.job_checkpoints import JobCheckpoints
from trainer.job_folder import JobFolder, deletions
from trainer.job_log import LogPiece, Logs
from trainer.job_run import JobRun
from trainer.journal import Heartbeat, Journal
from trainer.lender import Lender, LendsNothing
from trainer.library import Library
from trainer.means import Means, Preparer
from trainer.origins import Origins
from trainer.publisher import Publisher
from trainer.run_folder import RunFolder
from trainer.served import ServedModel
from trainer.sources import with_our_sources
from trainer.spec import JobSpec, PublishSpec
from trainer.watchdog import DEFAULT_TIMEOUT_S
from trainer.wishes import Wishes

logger = logging.getLogger(__name__)

JOBS_FOLDER = "jobs"
WORKER_MODULE = "trainer.worker"
EVENTS_PER_READ = 1000
RETRY_S = 30.0
"""After which is looked again at jobs that could not be gone on with."""


class Jobs:
    """All jobs of one gateway. Its owner awaits `run`, and calls `close` before the store's."""

    def __init__(
        self,
        store: JobStore,
        datasets: DatasetFiles,
        preparations: Preparer,
        publisher: Publisher,
        served: ServedModel,
        devices: Sequence[Device],
        root: Path,
        *,
        library: Library,
        python: str,
        environment: Mapping[str, str],
        price: Price | None = None,
        max_active: int = 1000,
        stall_timeout_s: float = DEFAULT_TIMEOUT_S,
        worker: Sequence[str] = ("-m", WORKER_MODULE),
        observe_wait: Callable[[int, float], None] = unobserved,
        clock_ns: Callable[[], int] = time.time_ns,
        lender: Lender | None = None,
    ) -> None:
        """`root` is the state folder. `library` has what jobs may train further. `python` is the
        interpreter that trains, and `worker` what it runs with a run's folder; `max_active` is
        how many jobs may have not ended; one whose process does not get on for `stall_timeout_s`
        goes on in another. `lender` is of devices on which something serves. See `DeviceQueue`
        for `observe_wait` and `clock_ns`."""
        self._store = store
        self._folder = root / JOBS_FOLDER
        self._journal = Journal(store, self._folder)
        self._logs = Logs()
        self._queue = DeviceQueue(devices, clock_ns=clock_ns, observe_wait=observe_wait)
        self._max_active = max_active

        def command(run: RunFolder) -> Sequence[str]:
            return python, *worker, str(run.path)

        self._means = Means(
            store=store,
            journal=self._journal,
            datasets=datasets,
            preparations=preparations,
            publisher=publisher,
            served=served,
            queue=self._queue,
            folder=self._folder,
            command=command,
            environment=with_our_sources(environment),
            lender=lender or LendsNothing(),
            stall_timeout_s=stall_timeout_s,
            clock_ns=clock_ns,
        )
        self._checkpoints = JobCheckpoints(self._means)
        self._origins = Origins(self._means, self._checkpoints, library)
        self._admission = Admission(self._means, self._origins, devices, python=python, price=price)
        self._wishes = Wishes(store, self._journal, self._wake)
        self._runs: dict[str, tuple[JobRun, asyncio.Task[None]]] = {}
        """Jobs that are brought to their end, by uid."""
        self._driving = False
        """Whether `run` has taken over; jobs that are created before wait for it."""
        self._seeded = False
        """Whether the queue knows what tenants had of the devices."""

    # --- the owner ----------------------------------------------------------

    async def run(self) -> None:
        """Go on with what the last process left, then bring all jobs to their end, until
        cancelled."""
        try:
            try:
                await self._sweep()
            except Exception:  # the next start sweeps again
                logger.exception("what is left of deleted jobs cannot be swept")
            await self._go_on()
            while True:
                well = await self._go_on()  # created meanwhile, or not readable before
                await (asyncio.Event().wait() if well else asyncio.sleep(RETRY_S))
        finally:
            await self._leave()

    async def _go_on(self) -> bool:
        """Drive all jobs that have not ended; whether that is all done.

        What is wrong with one job, or with the store for a while, is no reason to end the
        gateway.
        """
        try:
            if not self._seeded:  # before any device is held
                self._queue.seed(await self._store.device_uses())
                self._seeded = True
            keys = await self._store.active_jobs()
        except Exception:
            logger.exception("jobs cannot be listed; trying again")
            return False
        found: list[tuple[JobRecord, JobRun]] = []
        well = True
        for key in keys:
            try:
                job = await self._store.job(*key)
                if job.uid in self._runs or job.state.is_final:
                    continue
                run = JobRun(job, self._means)
                await run.find()  # all of them, before a device is given to another
            except JobUnknown:
                continue
            except Exception:
                logger.exception("job %s cannot be gone on with; trying again", key.job)
                well = False
            else:
                found.append((job, run))
        self._driving = True
        for job, run in found:
            logger.info("goes on with job %s, which is %s", job.name, job.state.name)
            self._drive(job, run)
        return well

    async def close(self) -> None:
        """Let go of all jobs. Training processes go on."""
        await self._leave()
        await self._journal.close()

    async def _leave(self) -> None:
        self._driving = False
        tasks = [task for _, task in self._runs.values()]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    def _drive(self, job: JobRecord, run: JobRun | None = None) -> None:
        """Bring a job to its end, unless that is done already or not our turn."""
        if not self._driving or job.state.is_final or job.uid in self._runs:
            return
        run = run or JobRun(job, self._means)
        task = asyncio.create_task(run.run(), name=f"job {job.name}")
        self._runs[job.uid] = run, task
        task.add_done_callback(lambda task: self._ended(job, task))

    def _ended(self, job: JobRecord, task: asyncio.Task[None]) -> None:
        del self._runs[job.uid]
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("job %s is left alone until the next start", job.name, exc_info=error)

    async def _sweep(self) -> None:
        """Settle what a crash left over of jobs that were created, and of deleted ones."""
        await self._origins.sweep()
        for folder, key in await asyncio.to_thread(lambda: list(deletions(self._folder))):
            try:
                if (await self._store.job(*key)).uid == folder.path.name:
                    continue  # the crash came before it was deleted
            except JobUnknown:
                pass
            except Exception:
                logger.exception("whether job %s is deleted cannot be told", key.job)
                continue
            await asyncio.to_thread(folder.remove)

    # --- before a job -------------------------------------------------------

    async def capabilities(self) -> Capabilities:
        """What can be trained here. Raises TrainingUnavailable if that cannot be told."""
        return await self._admission.capabilities()

    async def check(self, tenant: str, spec: JobSpec) -> JobSpec:
        """The spec with every field set; keeps nothing.

        Raises as `Admission.resolve` does.
        """
        return await self._admission.resolve(tenant, spec)

    async def estimate(self, tenant: str, spec: JobSpec) -> Estimate:
        """What a job would cost. Raises as `check` does, and DatasetInvalid."""
        return await self._admission.estimate(tenant, spec)

    def position_of_new(self, tenant: str, priority: int) -> int:
        """What `queue_position` would tell of a job that was QUEUED now; 0: it would not wait."""
        return self._queue.position_of_new(tenant, priority)

    # --- jobs ---------------------------------------------------------------

    async def create(
        self,
        tenant: str,
        spec: JobSpec,
        *,
        name: str = "",
        labels: Mapping[str, str] | None = None,
        priority: int = 0,
        request_id: str = "",
    ) -> JobRecord:
        """A job, or the one that this request made. Returns at once.

        Raises as `check` does, what `JobStore.create_job` raises, and StorageFull.
        """
        state = PublicationState.PENDING if spec.publish else PublicationState.NOT_REQUESTED
        new = NewJob(
            tenant=tenant,
            name=name,
            adapter=spec.adapter,
            dataset=spec.dataset,
            eval_dataset=spec.data.eval_dataset,
            spec=spec.model_dump(mode="json", exclude_defaults=True),
            labels=dict(labels or {}),
            priority=priority,
        )
        if request_id:  # first: what it needed to be made may be gone since
            made = await self._store.job_of_request(new, request_id)
            if made is not None:
                return made
        resolved = await self.check(tenant, spec)
        return await self._journal.surely(
            self._create(new, resolved, Publication(state=state, adapter=spec.adapter), request_id)
        )

    async def _create(
        self, new: NewJob, resolved: JobSpec, publication: Publication, request_id: str
    ) -> JobRecord:
        def create(uid: str) -> Awaitable[JobRecord]:
            return self._store.create_job(
                new,
                effective_spec=as_json(resolved),
                fingerprints=self._means.served.fingerprints,
                publication=as_json(publication),
                request_id=request_id,
                max_active=self._max_active,
                uid=uid,
            )

        job = await self._origins.created(new.tenant, resolved, create)
        self._drive(job)
        return job

    def queue_position(self, job: JobRecord) -> int:
        """From 1 for the job that is next; 0 for one that is not QUEUED."""
        return self._queue.position(job.uid) if job.state is JobState.QUEUED else 0

    async def cancel(self, tenant: str, name: str, *, discard: bool) -> JobRecord:
        """Ask a job to end; it is CANCELLING, or has ended. Raises JobUnknown."""
        return await self._journal.surely(self._wishes.cancel(tenant, name, discard=discard))

    async def pause(self, tenant: str, name: str) -> JobRecord:
        """Ask a job to save and wait; it is PAUSING, PAUSED, or VALIDATING and to be paused.
        Raises JobUnknown and JobNotPausable."""
        return await self._journal.surely(self._wishes.pause(tenant, name))

    async def resume(self, tenant: str, name: str) -> JobRecord:
        """Let a paused job go on. Raises JobUnknown and JobNotResumable."""
        return await self._journal.surely(self._wishes.resume(tenant, name))

    def _wake(self, uid: str) -> None:
        if (running := self._runs.get(uid)) is not None:
            running[0].wake()

    async def delete(self, tenant: str, name: str) -> None:
        """Delete a job that has ended, with all files of it. Raises JobUnknown, JobActive."""
        await self._journal.surely(self._delete(tenant, name))

    async def _delete(self, tenant: str, name: str) -> None:
        job = await self._store.job(tenant, name)
        # Whatever state it is in: it may end before it is deleted. The mark alone deletes nothing.
        try:
            await asyncio.to_thread(self._folder_of(job).mark_deleted, job.key)
        except OSError:  # a full disk is no reason to keep what fills it
            logger.exception("job %s cannot be marked as deleted", name)
        deleted = await self._store.delete_job(tenant, name)
        await asyncio.to_thread(self._folder_of(deleted).remove)

    def watch(
        self, tenant: str, name: str, *, after: int, heartbeat_s: float
    ) -> AsyncGenerator[JobEventRecord | Heartbeat, None]:
        """Events after a sequence number, then new ones without a gap, until the job has ended.
        Raises JobUnknown."""
        return self._journal.watch(tenant, name, after=after, heartbeat_s=heartbeat_s)

    async def logs(
        self, tenant: str, name: str, *, offset: int, follow: bool
    ) -> AsyncGenerator[LogPiece, None]:
        """What the training processes printed. Raises JobUnknown."""
        first = await self._store.job(tenant, name)

        async def look() -> JobRecord:
            job = await self._store.job(tenant, name)
            if job.uid != first.uid:
                raise JobUnknown(name)
            return job

        pieces = self._logs.pieces(look, self._folder_of(first), offset=offset, follow=follow)
        async with contextlib.aclosing(pieces):
            async for piece in pieces:
                yield piece

    # --- what a job saved ---------------------------------------------------

    async def checkpoints(self, tenant: str, name: str) -> list[Checkpoint]:
        """What a job has saved and is still there, newest first. Raises JobUnknown."""
        return await self._checkpoints.of_job(tenant, name)

    async def publish_checkpoint(
        self,
        tenant: str,
        name: str,
        *,
        step: int | None = None,
        adapter: str = "",
        publish: PublishSpec | None = None,
    ) -> Publication:
        """Make one checkpoint a version: the newest, if no step is named.

        What could not be done is FAILED in the answer. Raises JobUnknown, CheckpointUnknown,
        and GateRejected.
        """
        return await self._checkpoints.publish(tenant, name, step, adapter, publish)

    def _folder_of(self, job: JobRecord) -> JobFolder:
        return JobFolder(self._folder / job.uid)
