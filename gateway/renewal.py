"""Cores whose client slots run out, replaced before they do, at a quiet moment.

    few slots left -> drained, or idle for a while -> ended in order -> a new core, warm -> resumed

A core has 64 slots, and each worker that ever serves takes one for good (ADR 0002). One core at a
time is replaced (ADR 0011). Owned by the control plane.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from typing import Protocol

from gateway.drains import Drains, Wish
from gateway.exceptions import LastOpenShard
from gateway.keeper_state import KeeperState
from gateway.processes import Processes

logger = logging.getLogger(__name__)

LOW_SLOTS = 16
"""With so few left a core is to be renewed: more than workers that die while a stream ends."""
LAST_SLOTS = 4
"""With so few left it is renewed whatever runs there. Without any, no dead worker is replaced."""
LOOK_INTERVAL_S = 1.0
IDLE_S = 60.0
"""How long no request must have come before the only shard is taken away: its callers will be
refused for as long as the model loads."""


class Kept(Protocol):
    """A shard that can be renewed."""

    name: str
    state: KeeperState

    @property
    def slots_left(self) -> int:
        """Client slots of the core that were never taken."""

    async def renew(self) -> None:
        """Have the core replaced; returns when that is done."""


class Renewal:
    """Renews cores of `keepers`. Owned by the control plane, which runs it."""

    def __init__(self, keepers: Sequence[Kept], drains: Drains, processes: Processes) -> None:
        self._keepers = keepers
        self._drains = drains
        self._processes = processes
        self._waiting: set[str] = set()
        """Shards without which nobody would answer, that wait for a while without requests."""
        self._idle_since_s = 0.0
        self._placed = 0

    async def run(self) -> None:
        """Look for cores with few slots, and renew them, until cancelled."""
        while True:
            await asyncio.sleep(LOOK_INTERVAL_S)
            try:
                await self.look()
            except Exception:  # the gateway serves on, and it is tried again
                logger.exception("a core could not be renewed")

    async def look(self) -> None:
        """Renew the core that has the fewest slots left, if that are few."""
        running = [keeper for keeper in self._keepers if keeper.state is KeeperState.UP]
        keeper = min(running, key=lambda keeper: keeper.slots_left, default=None)
        if keeper is None or keeper.slots_left > LOW_SLOTS:
            return
        try:
            await self._drains.drain(keeper.name, wish=Wish.RENEWAL)
        except LastOpenShard:
            await self._renew_last(keeper)
            return
        logger.info("%s has %d client slots left: it is renewed", keeper.name, keeper.slots_left)
        try:
            await self._until_idle(keeper)
            if keeper.state is KeeperState.UP:  # else it died, and gets another core anyway
                await keeper.renew()
        except Exception:  # in any case it takes requests again
            logger.exception("%s could not be renewed", keeper.name)
        await self._drains.resume(keeper.name, wish=Wish.RENEWAL)

    async def _until_idle(self, keeper: Kept) -> None:
        """Wait until nothing runs there, it has died, or the last slots are to go."""
        while keeper.state is KeeperState.UP and not await self._drains.is_idle(keeper.name):
            if keeper.slots_left <= LAST_SLOTS:
                logger.critical("%s is renewed now: calls there are cut", keeper.name)
                return
            await asyncio.sleep(LOOK_INTERVAL_S)

    async def _renew_last(self, keeper: Kept) -> None:
        """Renew the only shard that answers, if nobody has asked for a while or it has to be."""
        if keeper.name not in self._waiting:
            self._waiting.add(keeper.name)
            self._idle_since_s = time.monotonic()
            logger.warning(
                "%s has %d client slots left, and no other shard answers: it is renewed after "
                "%g s without requests",
                *(keeper.name, keeper.slots_left, IDLE_S),
            )
        if keeper.slots_left > LAST_SLOTS:
            if not await self._has_been_idle(keeper):
                return
        else:
            logger.critical(
                "%s has %d client slots left, and is renewed now: calls are refused until it is up",
                *(keeper.name, keeper.slots_left),
            )
        self._waiting.discard(keeper.name)
        await keeper.renew()

    async def _has_been_idle(self, keeper: Kept) -> bool:
        placed = sum(answer.ever for answer in await self._processes.placed())
        if placed != self._placed or not await self._drains.is_idle(keeper.name):
            self._placed, self._idle_since_s = placed, time.monotonic()
        return time.monotonic() - self._idle_since_s >= IDLE_S
