"""An event loop in which time passes only when nothing is left to do, and threads take turns."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Any


class Deadlock(Exception):
    """Nothing is left to do, and nothing will come."""


class _NothingComes(selectors.SelectSelector):
    """Time passes in the place of waiting."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0

    def select(self, timeout: float | None = None) -> list[Any]:
        if timeout is None:
            raise Deadlock
        if timeout > 0:
            self.now_s += timeout
        return []


class VirtualLoop(asyncio.SelectorEventLoop):
    """Same program, same course: nothing of it depends on how fast a machine is."""

    def __init__(self) -> None:
        self._passing = _NothingComes()
        super().__init__(self._passing)
        self.threads: Callable[[Callable[[], Any], asyncio.Future[Any]], None] = _at_once
        """Does the work of a thread, some time, and resolves the future."""

    def time(self) -> float:
        return self._passing.now_s

    def rewind(self) -> None:
        """Begin at 0 again, with nothing to come: sums of times are rounded otherwise later, and
        what comes at the same time in an order that hangs on what else does."""
        self._passing.now_s = 0.0
        self._scheduled.clear()  # type: ignore[attr-defined]

    def run_in_executor(  # type: ignore[override]
        self, executor: Executor | None, func: Callable[..., Any], *args: Any
    ) -> asyncio.Future[Any]:
        future: asyncio.Future[Any] = self.create_future()
        if executor is None:
            self.threads(lambda: func(*args), future)
        else:  # the store's own thread: its calls are points of the host already
            resolve(lambda: func(*args), future)
        return future


def _at_once(work: Callable[[], Any], future: asyncio.Future[Any]) -> None:
    resolve(work, future)


def resolve(work: Callable[[], Any], future: asyncio.Future[Any]) -> None:
    """Do the work, and tell its result to whom it concerns, if anybody waits."""
    try:
        result = work()
    except Exception as error:
        if not future.done():
            future.set_exception(error)
    else:
        if not future.done():
            future.set_result(result)
