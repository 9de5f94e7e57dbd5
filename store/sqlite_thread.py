"""One connection to the registry's file, and the one thread that uses it."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar
from weakref import WeakValueDictionary

from store.sqlite_schema import connect, reading, transaction
from store.upload_folder import DatabaseFull

T = TypeVar("T")

_PRIMARY = 0xFF
"""Of an error code of SQLite: what it is; the rest says where it came from."""

_turns: WeakValueDictionary[Path, threading.Lock] = WeakValueDictionary()
"""Whose turn it is to write to a file, in this process. SQLite only looks now and then whether
its own lock is free, and somebody who writes all the time would keep it from the others."""


class SqliteThread:
    """A base of what is kept in the file. DatabaseFull is raised when the disk is full, and
    sqlite3.Error comes through when it fails. What else has the file open is waited for."""

    def __init__(
        self,
        path: Path,
        clock_ns: Callable[[], int],
        name: str,
        observe_commit: Callable[[float], None],
    ) -> None:
        """`clock_ns` tells the time of changes, in nanoseconds since the epoch; `name` is what
        the thread is called. `observe_commit` is told, in that thread, how many seconds each
        transaction took that is durable, without the wait for its turn."""
        self._path = path
        self._clock_ns = clock_ns
        self._observe_commit = observe_commit
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=name)
        self._turn = _turns.setdefault(path.absolute(), threading.Lock())
        self._connection: sqlite3.Connection | None = None  # the thread's alone
        self._closed = False

    async def open(self) -> None:
        await self._call(self._open)

    def _open(self) -> None:
        with self._turn:
            self._connection = connect(self._path, self._clock_ns())

    async def close(self) -> None:
        if not self._closed:
            self._closed = True
            await self._call(self._close)
            self._thread.shutdown()  # returns at once: the thread has nothing left to do

    def _close(self) -> None:
        if self._connection is not None:
            with self._turn:  # the last one to leave copies the log into the file
                self._connection.close()
            self._connection = None

    async def __aenter__(self) -> Self:
        try:
            await self.open()
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def _write(self, body: Callable[[sqlite3.Connection], T]) -> T:
        """Run `body` in the thread, as one transaction that is durable when this returns."""

        def run() -> T:
            db = self._opened()
            with self._turn:
                begin_s = time.perf_counter()
                with transaction(db):
                    result = body(db)
                self._observe_commit(time.perf_counter() - begin_s)
                return result

        return await self._call(run)

    async def _read(self, body: Callable[[sqlite3.Connection], T]) -> T:
        """Run `body` in the thread, on one picture of the file."""

        def run() -> T:
            db = self._opened()
            with reading(db):
                return body(db)

        return await self._call(run)

    def _opened(self) -> sqlite3.Connection:
        if self._connection is None:
            raise RuntimeError("the registry is not open")
        return self._connection

    async def _call(self, function: Callable[[], T]) -> T:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, function)
        except sqlite3.Error as error:
            if _is_full(error):
                raise DatabaseFull(
                    "the gateway's disk is full; go on later, or have its operator free space"
                ) from error
            raise


def _is_full(error: sqlite3.Error) -> bool:
    code: int | None = getattr(error, "sqlite_errorcode", None)  # not of all that is raised
    return code is not None and code & _PRIMARY == sqlite3.SQLITE_FULL


def unobserved(seconds: float) -> None:
    """Where nobody wants to know how long a transaction took."""


def check_limit(limit: int) -> None:
    """Raise ValueError unless `limit` is a number of rows to read."""
    if limit < 1:  # SQLite would take a negative one for none
        raise ValueError(f"limit must be at least 1, is {limit}")
