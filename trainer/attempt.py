"""One attempt: its process from start to end, and what it says on the way into the store."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence

from store.job_records import JobRecord
from trainer.ending import Ending, ending, said_last
from trainer.event_file import Line, read_events
from trainer.fence import raise_fence
from trainer.ingest import changes
from trainer.journal import Journal
from trainer.process import TrainingProcess, is_locked, kill_all
from trainer.run_folder import RunFolder, RunPlan, StopRequest, write_whole
from trainer.to_the_end import to_the_end
from trainer.watchdog import Watchdog, signs

logger = logging.getLogger(__name__)

POLL_INTERVAL_S = 0.2
"""How often is looked for new events, and whether the process lives."""
LOADING_STOP_S = 1.0
"""How long a process gets that has not done a step: there is nothing to save."""
TERMINATE_S = 5.0
"""How long a process gets that was asked to end at once."""
END_TRIES = 20
"""How often a process is killed that does not end: a minute, where it waits for a disk."""


class RunUnattached(Exception):
    """Something has the lock of an attempt that nobody follows, and it is not its process."""

    def __init__(self, run: RunFolder) -> None:
        super().__init__(f"{run.path}: its lock is held, and its process is not found")


class RunHung(Exception):
    """The process of an attempt does not get on."""

    def __init__(self, how: str) -> None:
        super().__init__(f"the training process {how}")
        self.how = how
        """In words that follow its name."""


class Attempt:
    """Owned by the run of its job, which calls `close`; the process goes on then."""

    def __init__(self, run: RunFolder, journal: Journal) -> None:
        self._run = run
        self._journal = journal
        self._process: TrainingProcess | None = None
        self._starting: asyncio.Task[None] | None = None
        self._busy = False
        """Whether the process had something to say yet when it was last looked at."""

    async def start(
        self, plan: RunPlan, command: Sequence[str], environment: Mapping[str, str]
    ) -> None:
        """Start the process. Raises OSError."""
        start = asyncio.to_thread(self._start, plan, command, environment)
        self._starting = asyncio.create_task(start)
        await self._journal.surely(self._started())

    async def _started(self) -> None:
        """Until a start that somebody was cancelled in has ended, too."""
        if self._starting is not None:
            await self._starting

    def _start(self, plan: RunPlan, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self._run.path.mkdir(parents=True, exist_ok=True)
        raise_fence(self._run, plan.attempt)
        write_whole(self._run.plan, plan)
        self._process = TrainingProcess.start(self._run, command, environment)

    async def find(self) -> bool:
        """Go on with its process if somebody before us started it; whether anything of it lives.

        Raises OSError if that cannot be told.
        """
        if self._starting is not None:
            await asyncio.wait({self._starting})
        # To the end: a thread that nobody waits for would leave a process that nobody closes.
        return await to_the_end(asyncio.to_thread(self._find))

    def _find(self) -> bool:
        if self._process is None:
            self._process = TrainingProcess.find(self._run)
        return self._process is not None or is_locked(self._run)

    async def attach(self) -> None:
        """Go on with its process, unless it has ended or said its last.

        Raises RunUnattached if another process has its lock, which may be one that we fail to
        recognize, and OSError as `find` does. Both are worth a retry.
        """
        lives = await self.find()
        if lives and self._process is None and not await asyncio.to_thread(said_last, self._run):
            raise RunUnattached(self._run)

    async def was_started(self) -> bool:
        """Whether a process was ever started for it; the lock is made just before."""
        if self._starting is not None:  # somebody was cancelled in that
            await asyncio.wait({self._starting})
        return self._process is not None or self._run.lock.exists()

    async def follow(
        self, job: JobRecord, until_s: float | None = None, watchdog: Watchdog | None = None
    ) -> JobRecord:
        """Take in its events until it has said its last, or until that time on the loop's clock.

        Returns the job as it is then. Raises JobChanged if somebody else changed its state, and
        RunHung if the watchdog says so.
        """
        clock = asyncio.get_running_loop().time
        while True:
            busy, lines = await asyncio.to_thread(self._look, job.ingested_bytes)
            for change in changes(job, lines):
                job = await self._journal.change(job, change)
            if lines:
                continue
            if not busy or (until_s is not None and clock() >= until_s):
                return job
            if watchdog is not None and (
                how := watchdog.look(await asyncio.to_thread(signs, self._run))
            ):
                raise RunHung(how)
            left_s = POLL_INTERVAL_S if until_s is None else until_s - clock()
            await asyncio.sleep(max(0.0, min(POLL_INTERVAL_S, left_s)))

    def _look(self, offset: int) -> tuple[bool, list[Line]]:
        # Before the read: what a process that has ended wrote is there.
        self._busy = self._goes_on()
        return self._busy, read_events(self._run.events, offset)

    async def stop(self, job: JobRecord, *, save: bool, grace_s: float) -> JobRecord:
        """Ask it to end, each time with more emphasis. `end` has to follow.

        The file means "save and end", and a signal on top of it "at once".
        """
        if self._starting is not None:
            await asyncio.wait({self._starting})
        if self._process is None:
            return job
        try:
            await asyncio.to_thread(write_whole, self._run.stop, StopRequest(save=save))
        except OSError as error:  # a full disk is no reason not to end
            logger.error("%s: cannot be asked to save: %s", self._run.path, error)
            grace_s = 0.0
        clock = asyncio.get_running_loop().time
        end_s = clock() + grace_s
        job = await self.follow(job, min(end_s, clock() + LOADING_STOP_S))
        if job.progress is not None:
            job = await self.follow(job, end_s)
        if self._busy:
            self._process.terminate()
            job = await self.follow(job, clock() + TERMINATE_S)
        return job

    async def end(self) -> None:
        """Leave no process of it; one that cannot be killed is given up after a while. Raises
        OSError if processes cannot be looked at."""
        if self._starting is not None:
            await asyncio.wait({self._starting})
        for _ in range(END_TRIES):
            if await asyncio.to_thread(kill_all, self._run):
                return
            logger.error("%s: a process of it does not end; trying again", self._run.path)
        # The kernel holds it. The job is not to hang on it for ever, nor those that wait.
        logger.error("%s: a process of it is left over: end it by hand", self._run.path)

    async def goes_on(self) -> bool:
        """Whether its process runs, and has more to say. Raises OSError as `find` does."""
        await self.find()
        return await asyncio.to_thread(self._goes_on)

    def _goes_on(self) -> bool:
        process = self._process
        return process is not None and process.running and not said_last(self._run)

    async def ending(self) -> Ending:
        """How it ended."""
        return await asyncio.to_thread(self._ending)

    def _ending(self) -> Ending:
        return ending(self._run, None if self._process is None else self._process.exit_code)

    def close(self) -> None:
        """Look at it no more."""
        if self._process is not None:
            self._process.close()
            self._process = None
