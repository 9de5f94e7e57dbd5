"""One worker process as the host sees it."""

from __future__ import annotations

import enum
import multiprocessing

from engine.core import ClientSlot
from engine.signals import group_signals_blocked
from gateway.channel import Channel
from gateway.messages import HostMessage, WorkerMessage
from gateway.worker import worker_main

WorkerChannel = Channel[HostMessage, WorkerMessage]


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


_AT_WORK = frozenset({WorkerState.ATTACHING, WorkerState.SERVING, WorkerState.DRAINING})


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
        self.failure = ""
        """Why it could not serve, in its own words."""

    @property
    def pid(self) -> int:
        """Process id."""
        assert self._process.pid is not None
        return self._process.pid

    @property
    def at_work(self) -> bool:
        """Whether it has got its orders: it has calls, or is about to."""
        return self.state in _AT_WORK

    def move(self, state: WorkerState) -> None:
        """Go to another state. Raises ValueError for a move that is not in TRANSITIONS."""
        if state not in TRANSITIONS[self.state]:
            raise ValueError(f"worker {self.pid} cannot go from {self.state} to {state}")
        self.state = state

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
