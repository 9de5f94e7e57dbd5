"""Reads that many ask for at once, done once.

All who watch a job wake at the same change and ask for the same. Each for itself, 2,000 of them
held the store's one thread for 0.4 s, in which the job's next change waited.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Hashable
from typing import Any, TypeVar

T = TypeVar("T")


class SharedReads:
    """Reads that are going on. For one event loop."""

    def __init__(self) -> None:
        self._going: dict[Hashable, asyncio.Task[Any]] = {}

    async def read(self, key: Hashable, read: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """What `read` finds, or what a read of the same key finds that has begun already.

        So what it finds may be older than the call. Who must not miss a change puts something
        into the key that every change replaces, and takes it before. Raises what the read does.
        One who is cancelled leaves the read to the others.
        """
        task = self._going.get(key)
        if task is None:
            task = self._going[key] = asyncio.create_task(read())
            task.add_done_callback(lambda done: self._end(key, done))
        found: T = await asyncio.shield(task)
        return found

    def _end(self, key: Hashable, done: asyncio.Task[Any]) -> None:
        del self._going[key]
        if not done.cancelled():
            done.exception()  # looked at, also where all have left
