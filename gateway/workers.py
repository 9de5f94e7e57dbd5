"""The worker processes of a host: started, kept at their number, drained.

One more than needed waits as a standby with its imports done; it takes a dead worker's
place in milliseconds, on fresh client slots, and the next standby starts. A worker that hangs is
killed: it is asked all the time whether it is there.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from engine.core import Started, ignore
from engine.errors import SlotsUsedUp
from gateway import metrics
from gateway.messages import (
    Acquitted,
    Answer,
    AreYouThere,
    Ask,
    Drain,
    Ended,
    Failed,
    Imported,
    Orders,
    Question,
    Serving,
    Told,
    Unasked,
    Used,
    WaitsForSlot,
    Want,
    WentIdle,
)
from gateway.note import NOTES_KEPT, Note
from gateway.silence import until_silent
from gateway.worker_process import WorkerProcess, WorkerState

logger = logging.getLogger(__name__)

RETRY_DELAY_S = 5.0
"""Pause after a replacement could not serve, before the next is tried."""
ATTACH_TIMEOUT_S = 120.0
"""How much longer than its limit a worker may take for its first answer: before that it attaches,
and waits for each core in its event loop, 10 s for one that has just died (ADR 10)."""
EXIT_TIMEOUT_S = 20.0
"""How long a worker gets to exit after its grace before it is killed."""


class WorkerFailed(Exception):
    """A worker could not serve. The message says why, in one line."""


class _Question:
    """A question to several workers, until all have answered or died."""

    def __init__(self, asked: set[WorkerProcess]) -> None:
        self.values: list[Any] = []
        self.done = asyncio.Event()
        self._open = asked
        self.forget(None)

    def answer(self, worker: WorkerProcess, value: Any) -> None:
        self.values.append(value)
        self.forget(worker)

    def forget(self, worker: WorkerProcess | None) -> None:
        if worker is not None:
            self._open.discard(worker)
        if not self._open:
            self.done.set()


class WorkerFleet:
    """All workers of the host. `run` owns them until they are drained."""

    def __init__(
        self,
        count: int,
        make_orders: Callable[[], Orders],
        after_death: Callable[[WorkerProcess], Awaitable[None]],
        hear: Callable[[Unasked], None],
        started: Started = ignore,
        stall_timeout_s: float = 30.0,
    ) -> None:
        """`make_orders` is asked for each worker that is put to work, and takes fresh slots;
        it may raise SlotsUsedUp. `after_death` cleans up after one that died. `hear` is told
        what workers say unasked, and `started` of each that is started. One that does not answer
        for `stall_timeout_s` is killed."""
        self._count = count
        self._make_orders = make_orders
        self._after_death = after_death
        self._hear = hear
        self._started = started
        self._stall_timeout_s = stall_timeout_s
        self._watches: dict[WorkerProcess, asyncio.Task[None]] = {}
        """Of those at work: each ends when its worker hangs, or is gone."""
        self._dying: set[WorkerProcess] = set()
        """Dead, and what they left in the cores is not aborted yet."""
        self._questions: dict[int, _Question] = {}
        self._tickets = itertools.count(1)
        self._workers: set[WorkerProcess] = set()
        self._tasks: asyncio.TaskGroup | None = None
        self._changed = asyncio.Event()
        self._open = False
        """Whether workers may be put to work: not before the cores run."""
        self._draining = False
        self.notes: deque[Note] = deque(maxlen=NOTES_KEPT)
        """Deaths of workers, the newest last."""

    async def run(self) -> None:
        """Keep the fleet at its number until it is drained.

        Raises WorkerFailed if a worker cannot serve while none does.
        """
        try:
            async with asyncio.TaskGroup() as tasks:
                self._tasks = tasks
                for _ in range(self._count):
                    self._spawn()
                await self._drained()
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None

    @property
    def draining(self) -> bool:
        """Whether workers end, and none takes their place."""
        return self._draining

    @property
    def numbers(self) -> Mapping[WorkerState, int]:
        """How many workers are in each state."""
        return Counter(worker.state for worker in self._workers)

    def open(self) -> None:
        """Put workers to work as they become ready. The cores run from now on."""
        self._open = True
        self._assign()

    def fill(self) -> None:
        """Put standbys to work for which there was no slot before."""
        self._assign()

    async def wait_serving(self) -> None:
        """Wait until as many workers serve as should."""
        while self._number(WorkerState.SERVING) < self._count:
            self._changed.clear()
            await self._changed.wait()

    def tell(self, message: Told) -> None:
        """Tell every worker that serves, is about to, or still finishes its calls."""
        for worker in self._workers:
            if worker.at_work:
                worker.channel.send(message)

    def ask(self, question: Question, timeout_s: float | None = None) -> Awaitable[list[Any]]:
        """Ask every worker that has calls or will; awaited, the answers of all that lived, or
        after `timeout_s` those that have come.

        The question is sent before this returns. One that dies counts as having answered once
        what it left in the cores is aborted.
        """
        return self.ask_each(lambda worker: question, timeout_s)

    def ask_each(
        self, question_for: Callable[[WorkerProcess], Question], timeout_s: float | None = None
    ) -> Awaitable[list[Any]]:
        """The same, with a question of its own for each."""
        at_work = {worker for worker in self._workers if worker.at_work}
        ticket = next(self._tickets)
        self._questions[ticket] = _Question(at_work | self._dying)
        for worker in at_work:
            worker.channel.send(Ask(ticket, question_for(worker)))
        return self._answers(ticket, timeout_s)

    def _is_there(self, worker: WorkerProcess) -> Awaitable[list[Any]]:
        ticket = next(self._tickets)
        self._questions[ticket] = _Question({worker})
        worker.channel.send(Ask(ticket, AreYouThere()))
        return self._answers(ticket, None)

    async def _answers(self, ticket: int, timeout_s: float | None) -> list[Any]:
        question = self._questions[ticket]
        try:
            async with asyncio.timeout(timeout_s):
                await question.done.wait()
        except TimeoutError:
            logger.warning("a worker does not answer in %g s", timeout_s)
        finally:
            del self._questions[ticket]
        return question.values

    async def drain(self, delay_s: float, grace_s: float) -> None:
        """End all workers: those that serve get `grace_s` for their running calls.

        May be called again with less time while it runs.
        """
        self._draining = True
        for worker in self._workers:
            # One that attaches may have calls before its Serving is read here.
            if worker.state in (WorkerState.SERVING, WorkerState.ATTACHING):
                worker.channel.send(Drain(delay_s, grace_s))
                worker.move(WorkerState.DRAINING)
            elif worker.state is not WorkerState.DRAINING:
                worker.kill()  # has no calls
        self._note_change()
        try:
            await asyncio.wait_for(self._drained(), delay_s + grace_s + EXIT_TIMEOUT_S)
        except TimeoutError:
            logger.error("%d workers did not end in time; killed", len(self._workers))
            self.kill()
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
        self._started(worker.pid, "worker")
        self._tasks.create_task(self._own(worker))

    async def _own(self, worker: WorkerProcess) -> None:
        """Follow one worker from its start to its end, and see to its successor."""
        try:
            await self._listen(worker)  # ends when the worker does
        finally:
            worker.kill()
            died_in, code = worker.state, worker.reap()
            worker.move(WorkerState.ENDED)
            self._workers.discard(worker)
            if (watch := self._watches.pop(worker, None)) is not None:
                watch.cancel()
            self._note_change()
        if self._draining:
            self._forget(worker)
            return
        metrics.worker_deaths.inc()
        text = f"worker {worker.pid} died while {died_in.value} (exit code {code})"
        logger.error(text)
        self.notes.append(Note(time.time(), text, is_trouble=True))
        assert self._tasks is not None
        self._dying.add(worker)
        self._tasks.create_task(self._clean_up(worker))
        if died_in is not WorkerState.SERVING:
            if not self._number(WorkerState.SERVING):
                raise WorkerFailed(worker.failure or f"worker ended while {died_in.value}")
            await asyncio.sleep(RETRY_DELAY_S)  # what stopped it may stop the next as well
        self._assign()

    async def _watch(self, worker: WorkerProcess) -> None:
        """End a worker that hangs: its callers get nothing, and others wait for what it holds."""
        limit_s = self._stall_timeout_s
        await until_silent(lambda: self._is_there(worker), limit_s, limit_s + ATTACH_TIMEOUT_S)
        text = f"worker {worker.pid} has not answered for {limit_s:g} s: killed"
        logger.error(text)
        self.notes.append(Note(time.time(), text, is_trouble=True))
        metrics.worker_stalls.inc()
        worker.kill()

    async def _clean_up(self, worker: WorkerProcess) -> None:
        try:
            await self._after_death(worker)
        finally:
            self._dying.discard(worker)
            self._forget(worker)

    def _forget(self, worker: WorkerProcess) -> None:
        """Wait for no answer of a worker that is gone."""
        for question in self._questions.values():
            question.forget(worker)

    async def _listen(self, worker: WorkerProcess) -> None:
        while (message := await worker.channel.receive()) is not None:
            match message:
                case Imported() if worker.state is WorkerState.IMPORTING:
                    worker.move(WorkerState.STANDBY)
                case Serving() if worker.state is WorkerState.ATTACHING:
                    worker.move(WorkerState.SERVING)
                    for slot in worker.slots:
                        slot.close()  # the worker has its own copy of the listeners now
                    logger.info("worker %d is serving", worker.pid)
                case Failed(reason):
                    worker.failure = reason
                    return  # it is of no use any more, and ended if it does not end
                case Answer(ticket, value):
                    if (question := self._questions.get(ticket)) is not None:
                        question.answer(worker, value)
                    continue
                case Want() | WaitsForSlot() | WentIdle() | Ended() | Used() | Acquitted():
                    self._hear(message)
                    continue
            self._assign()
            self._note_change()

    def _assign(self) -> None:
        """Put standbys to work where workers are missing, and keep one in reserve."""
        if self._draining or not self._open:
            return
        busy = self._number(WorkerState.SERVING) + self._number(WorkerState.ATTACHING)
        for worker in list(self._workers):
            if busy < self._count and worker.state is WorkerState.STANDBY and self._order(worker):
                busy += 1
        idle = self._number(WorkerState.IMPORTING) + self._number(WorkerState.STANDBY)
        # The reserve starts last: its imports would slow down those that are needed now.
        reserve = 1 if self._number(WorkerState.SERVING) == self._count else 0
        for _ in range(self._count + reserve - busy - idle):
            self._spawn()

    def _order(self, worker: WorkerProcess) -> bool:
        """Put one worker to work. False if there is no slot for it before a core is renewed."""
        try:
            orders = self._make_orders()
        except SlotsUsedUp as error:
            logger.critical("%s; worker %d waits until a core is renewed", error, worker.pid)
            return False
        worker.slots = list(orders.slots)
        worker.channel.send(orders)
        worker.move(WorkerState.ATTACHING)
        assert self._tasks is not None
        self._watches[worker] = self._tasks.create_task(self._watch(worker))
        return True

    def _number(self, state: WorkerState) -> int:
        return sum(worker.state is state for worker in self._workers)

    def _note_change(self) -> None:
        for state in WorkerState:
            metrics.workers.labels(state.value).set(self._number(state))
        self._changed.set()
