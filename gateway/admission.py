"""Who may start work, and how running work is ended from outside."""

from __future__ import annotations

import asyncio
import enum
from collections.abc import Container, Iterator
from contextlib import contextmanager
from typing import ClassVar

from gateway.call import Call

MAX_CONCURRENT_REQUESTS = 1024
"""Generation requests that one worker admits; the engine queues what it cannot run yet.
Beyond this, waiting costs memory and everyone's latency, and a refusal is kinder."""
MAX_WATCHES = 4096
"""Watches and logs that are followed. They have a bound of their own: while they shared the 256
slots of all else, 256 of them shut everybody out of validating and publishing. One that is idle
costs the host 35 KiB, and a worker 50; an event of a job takes the host 0.1 ms for each who watches
it, so 0.4 s for all (4,000 watchers of one job, two cores)."""
RETRY_DELAY_S = 1.0
"""What RetryInfo advises while draining or overloaded."""


class Shed(enum.Enum):
    """Why a call is not admitted; the values are a metric's label."""

    OVERLOADED = "overloaded"
    DRAINING = "draining"


class Overloaded(Exception):
    """The gateway holds as many calls of a kind as it admits."""

    shed: ClassVar = Shed.OVERLOADED

    def __init__(self, limit: int, what: str = "requests") -> None:
        super().__init__(f"the gateway holds {limit} {what}, its limit; retry later")
        self.limit = limit


class Draining(Exception):
    """The server is shutting down: no new calls, and at the end of its grace no running ones."""

    shed: ClassVar = Shed.DRAINING

    def __init__(self) -> None:
        super().__init__("the server is shutting down; retry, on another connection")


class Slots:
    """Places for calls of one kind: who waits long is not to shut out who works."""

    def __init__(self, limit: int, what: str = "requests") -> None:
        """`what` is held, for people."""
        self.limit = limit
        self.held = 0
        """Calls that are admitted and not done."""
        self._what = what

    @contextmanager
    def slot(self) -> Iterator[None]:
        """Hold one place. Raises Overloaded when all are taken."""
        if self.held >= self.limit:
            raise Overloaded(self.limit, self._what)
        self.held += 1
        try:
            yield
        finally:
            self.held -= 1


class Admission(Slots):
    """The calls of one process: open or closed, how many, and a way to end them all.

    Its slots are for what computes: generation in a worker.
    """

    def __init__(self, limit: int = MAX_CONCURRENT_REQUESTS) -> None:
        super().__init__(limit)
        self._calls: set[Call] = set()
        self._closed_by: Exception | None = None
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def calls(self) -> frozenset[Call]:
        """The calls that run now."""
        return frozenset(self._calls)

    @contextmanager
    def track(self, call: Call) -> Iterator[None]:
        """Count a call while it runs. Raises Draining, or why else the worker was closed."""
        if self._closed_by is not None:
            # Raised for many calls: without the frames of the others, and their messages.
            raise self._closed_by.with_traceback(None)
        self._calls.add(call)
        self._idle.clear()
        try:
            yield
        finally:
            self._calls.discard(call)
            if not self._calls:
                self._idle.set()

    def close(self, reason: Exception) -> None:
        """Refuse new calls with `reason`; running ones go on."""
        self._closed_by = reason

    async def wait_idle(self, timeout_s: float) -> bool:
        """Wait until no call runs. False if some still do after `timeout_s`."""
        try:
            await asyncio.wait_for(self._idle.wait(), timeout_s)
        except TimeoutError:
            return self._idle.is_set()  # with no time at all nothing was awaited
        return True

    def cut_all(self, reason: Exception, methods: Container[str] | None = None) -> None:
        """End every running call with `reason`; with `methods`, those of these alone."""
        for call in self.calls:
            if methods is None or call.method in methods:
                call.cut(reason)
