"""The state of the gateway for all who look at it: read once for all, and only while anybody does.

    first viewer -> read every second -> what changed -> each viewer, at its own pace -> last leaves

A viewer is a place and a wake-up, so a slow one costs nothing: it gets the latest state when it is
ready, and misses those in between.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator

from gateway.admission import Draining, Slots
from gateway.status import Status, encode

logger = logging.getLogger(__name__)

READ_INTERVAL_S = 1.0
HEARTBEAT_S = 5.0
"""After which a viewer to whom nothing was told is told that."""
MAX_VIEWERS = 32
"""People and wall screens. Each costs a connection, and a state in a buffer if it is slow."""


class StatusFeed:
    """Tells the state to viewers. Its owner calls `close` before what is read closes."""

    def __init__(
        self,
        read: Callable[[], Awaitable[Status]],
        *,
        interval_s: float = READ_INTERVAL_S,
        heartbeat_s: float = HEARTBEAT_S,
        max_viewers: int = MAX_VIEWERS,
    ) -> None:
        self._read = read
        self._interval_s = interval_s
        self._heartbeat_s = heartbeat_s
        self._seats = Slots(max_viewers, "viewers of the status page")
        self._latest: bytes | None = None
        """None: nothing was read since the first viewer came."""
        self._changed = asyncio.Event()
        """Replaced with each change."""
        self._reading: asyncio.Task[None] | None = None
        self._closed = False

    @contextlib.contextmanager
    def seat(self) -> Iterator[None]:
        """The place of one viewer. Raises Overloaded when all are taken, and Draining at the
        end."""
        if self._closed:
            raise Draining
        with self._seats.slot():
            if self._reading is None:
                self._reading = asyncio.create_task(self._keep_reading())
            try:
                yield
            finally:
                if self._seats.held == 1 and self._reading is not None:
                    self._reading.cancel()
                    self._reading = None
                    self._latest = None  # it would be old when the next one comes

    async def follow(self) -> AsyncGenerator[bytes | None, None]:
        """The state, then each later one, encoded; None where nothing came for a while. Ends when
        the feed is closed. For who has a seat."""
        told: bytes | None = None
        while not self._closed:
            changed, latest = self._changed, self._latest
            if latest is not None and latest != told:
                told = latest
                yield latest
                continue
            try:
                await asyncio.wait_for(changed.wait(), self._heartbeat_s)
            except TimeoutError:
                yield None

    async def close(self) -> None:
        """End what all viewers follow, and stop reading. Safe to call twice."""
        self._closed = True
        self._wake()
        if (reading := self._reading) is not None:
            self._reading = None
            reading.cancel()
            await asyncio.wait((reading,))

    async def _keep_reading(self) -> None:
        well = True
        while True:
            began_s = time.monotonic()
            try:
                snapshot = encode(await self._read())
            except Exception:  # the page is no reason to end anything
                if well:
                    logger.exception("the status cannot be read; trying again")
                well = False
            else:
                well = True
                if snapshot != self._latest:
                    self._latest = snapshot
                    self._wake()
            await asyncio.sleep(max(0.0, began_s + self._interval_s - time.monotonic()))

    def _wake(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()
