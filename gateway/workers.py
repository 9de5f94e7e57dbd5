"""The worker processes of a host: started, kept at their number, drained.

One more than needed waits as a standby with its imports done; it takes a dead worker's
place in milliseconds, on fresh client slots, and the next standby starts.
"""

from __future__ import annotations

import asyncio
import enum
import logging
import multiprocessing
from collections.abc import Awaitable, Callable

from engine.core import ClientSlot
from engine.signals import group_signals_blocked
from gateway import metrics
from gateway.channel import (
    Channel,
    Drain,
    Failed,
    HostMessage,
    Imported,
    Serve,
    Serving,
    ShardDied,
    ShowView,
    WorkerMessage,
)
from gateway.worker import worker_main

logger = logging.getLogger(__name__)

WorkerChannel = Channel[HostMessage, WorkerMessage]

EXIT_TIMEOUT_S = 20.0
"""How long a worker gets to exit after its grace before it is killed."""


class WorkerFailed(Exception):
    """A worker could not serve. The message says why, in one line."""


class WorkerState(enum.Enum):
    """Where a worker stands."""

    IMPORTING = "importing"
    STANDBY = "standby"
    ATTACHING = "attaching"
    SERVING = "serving"
    DRAINING = "draining"
    ENDED = "ended"


TRANSITIONS: dict[WorkerState, frozenset[WorkerState]] = {
    WorkerState.IMPORTING: frozenset(
        {WorkerState.STANDBY, WorkerState.DRAINING, WorkerState.ENDED}
    ),
    WorkerState.STANDBY: frozenset(
        {WorkerState.ATTACHING, WorkerState.DRAINING, WorkerState.ENDED}
    ),
    WorkerState.ATTACHING: frozenset(
        {WorkerState.SERVING, WorkerState.DRAINING, WorkerState.ENDED}
    ),
    WorkerState.SERVING: frozenset({WorkerState.DRAINING, WorkerState.ENDED}),
    WorkerState.DRAINING: frozenset({WorkerState.ENDED}),
    WorkerState.ENDED: frozenset(),
}


class WorkerProcess:
    """One worker as the host sees it."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        self._process = context.Process(
            target=worker_main, args=(theirs,), name="gateway-worker", daemon=True
        )
        with group_signals_blocked():
            self._process.start()
        theirs.close()
        self.channel: WorkerChannel = Channel(ours)
        self.state = WorkerState.IMPORTING
        self.slots: list[ClientSlot] = []
        self.ended = asyncio.Event()
        asyncio.get_running_loop().add_reader(self._process.sentinel, self._on_end)

    @property
    def pid(self) -> int:
        """Process id."""
        assert self._process.pid is not None
        return self._process.pid

    def move(self, state: WorkerState) -> None:
        """Go to another state. Raises ValueError for a move that is not in TRANSITIONS."""
        if state not in TRANSITIONS[self.state]:
            raise ValueError(f"worker {self.pid} cannot go from {self.state} to {state}")
        self.state = state

    def _on_end(self) -> None:
        asyncio.get_running_loop().remove_reader(self._process.sentinel)
        self.ended.set()

    def kill(self) -> None:
        """End the process at once."""
        self._process.kill()

    def reap(self) -> int | None:
        """Collect the ended process; returns its exit code."""
        self._process.join()
        self.channel.close()
        for slot in self.slots:
            slot.close()
        return self._process.exitcode


class WorkerFleet:
    """All workers of the host. `run` owns them until it is cancelled or told to drain."""

    def __init__(
        self,
        count: int,
        prepare: Callable[[], Serve],
        release: Callable[[WorkerProcess], Awaitable[None]],
    ) -> None:
        """`prepare` makes the orders of a new worker, with fresh slots; `release` cleans up
        in the cores after one that died."""
        self._count = count
        self._prepare = prepare
        self._release = release
        self._workers: set[WorkerProcess] = set()
        self._tasks: asyncio.TaskGroup | None = None
        self._changed = asyncio.Event()
        self._open = False
        """Whether workers may be put to work: not before the cores run, not while draining."""
        self._draining = False

    async def run(self) -> None:
        """Keep the fleet at its number. Raises WorkerFailed if a worker cannot serve."""
        try:
            async with asyncio.TaskGroup() as tasks:
                self._tasks = tasks
                for _ in range(self._count):
                    self._spawn()
                await self._drained()
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None

    def open(self) -> None:
        """Put workers to work as they become ready. The cores run from now on."""
        self._open = True
        self._assign()

    async def wait_serving(self) -> None:
        """Wait until as many workers serve as should."""
        while self._number(WorkerState.SERVING) < self._count:
            self._changed.clear()
            await self._changed.wait()

    def tell(self, message: ShowView | ShardDied) -> None:
        """Tell every worker that serves."""
        for worker in self._workers:
            if worker.state is WorkerState.SERVING:
                worker.channel.send(message)

    async def drain(self, delay_s: float, grace_s: float) -> None:
        """End all workers: those that serve get `grace_s` for their running calls."""
        self._draining = True
        for worker in self._workers:
            if worker.state is WorkerState.SERVING:
                worker.channel.send(Drain(delay_s, grace_s))
            else:
                worker.kill()  # has no calls
            worker.move(WorkerState.DRAINING)
        self._note_change()
        try:
            await asyncio.wait_for(self._drained(), delay_s + grace_s + EXIT_TIMEOUT_S)
        except TimeoutError:
            for worker in self._workers:
                logger.error("worker %d did not end in time; killed", worker.pid)
                worker.kill()
            await self._drained()

    def kill(self) -> None:
        """End all workers at once."""
        self._draining = True
        for worker in self._workers:
            worker.kill()

    async def _drained(self) -> None:
        while not (self._draining and not self._workers):
            self._changed.clear()
            await self._changed.wait()

    def _spawn(self) -> None:
        assert self._tasks is not None
        worker = WorkerProcess()
        self._workers.add(worker)
        self._tasks.create_task(self._own(worker))

    async def _own(self, worker: WorkerProcess) -> None:
        """Follow one worker from its start to its end, and see to its successor."""
        listening = asyncio.ensure_future(self._listen(worker))
        ended = asyncio.ensure_future(worker.ended.wait())
        try:
            await asyncio.wait({listening, ended}, return_when=asyncio.FIRST_COMPLETED)
            if listening.done():
                listening.result()  # a worker that says Failed ends the fleet
            await ended
        finally:
            listening.cancel()
            ended.cancel()
            worker.kill()
            died_in, code = worker.state, worker.reap()
            worker.move(WorkerState.ENDED)
            self._workers.discard(worker)
            self._note_change()
        if not self._draining:
            metrics.worker_deaths.inc()
            logger.error("worker %d died while %s (exit code %s)", worker.pid, died_in.value, code)
            self._assign()
            await self._release(worker)

    async def _listen(self, worker: WorkerProcess) -> None:
        while (message := await worker.channel.receive()) is not None:
            match message:
                case Imported() if worker.state is WorkerState.IMPORTING:
                    worker.move(WorkerState.STANDBY)
                    self._assign()
                case Serving() if worker.state is WorkerState.ATTACHING:
                    worker.move(WorkerState.SERVING)
                    for slot in worker.slots:
                        slot.close()  # the worker has its own copy of the listeners now
                    logger.info("worker %d is serving", worker.pid)
                    self._assign()
                case Failed(reason):
                    raise WorkerFailed(reason)
            self._note_change()

    def _assign(self) -> None:
        """Put standbys to work where workers are missing, and keep one in reserve."""
        if self._draining or not self._open:
            return
        busy = self._number(WorkerState.SERVING) + self._number(WorkerState.ATTACHING)
        for worker in list(self._workers):
            if busy < self._count and worker.state is WorkerState.STANDBY:
                orders = self._prepare()
                worker.slots = list(orders.slots)
                worker.channel.send(orders)
                worker.move(WorkerState.ATTACHING)
                busy += 1
        # The reserve starts last: its imports would slow down those that are needed now.
        if self._number(WorkerState.SERVING) == self._count or self._missing(busy):
            while len(self._workers) < self._count + 1:
                self._spawn()

    def _missing(self, busy: int) -> bool:
        waiting = self._number(WorkerState.IMPORTING) + self._number(WorkerState.STANDBY)
        return busy + waiting < self._count

    def _number(self, state: WorkerState) -> int:
        return sum(worker.state is state for worker in self._workers)

    def _note_change(self) -> None:
        for state in WorkerState:
            metrics.workers.labels(state.value).set(self._number(state))
        self._changed.set()
