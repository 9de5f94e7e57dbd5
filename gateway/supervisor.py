"""The supervisor: all shards of the host, from their start to their end."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from engine.core import ClientSlot, EngineConfig
from engine.errors import SlotsUsedUp
from engine.model_info import ModelInfo
from engine.shard import VllmShard
from gateway.followers import Followers
from gateway.keeper import ShardKeeper
from gateway.keeper_state import KeeperState

STARTS_AT_ONCE = 8
"""Cores that load at the same time. Each has a thread of the host's wait for it."""


class Supervisor:
    """Starts the cores, keeps them up and ends them. Owned by the host, which calls `stop`."""

    def __init__(self, keepers: Iterable[ShardKeeper], *, compiles: bool) -> None:
        """`compiles`: whether engines of this kind compile code and share it by caches."""
        self._keepers = {keeper.name: keeper for keeper in keepers}
        self._compiles = compiles
        self._model: ModelInfo | None = None

    @property
    def keepers(self) -> list[ShardKeeper]:
        """One for each shard, in the order of their numbers."""
        return list(self._keepers.values())

    @property
    def shards(self) -> list[VllmShard]:
        """The host's clients of the cores that run."""
        keepers = self._keepers.values()
        return [keeper.shard for keeper in keepers if keeper.shard is not None]

    @property
    def model(self) -> ModelInfo:
        """What each shard serves."""
        assert self._model is not None, "a core was started"
        return self._model

    async def start(self, config: EngineConfig) -> None:
        """Start all cores. `config` is the first one's.

        They start beside each other; if they compile, the first fills the caches alone before.
        Raises CoreFailed for the first that cannot start; the others are ended then.
        """
        first, *others = self._keepers.values()
        turns = asyncio.Semaphore(STARTS_AT_ONCE)

        async def start(keeper: ShardKeeper, config: EngineConfig | None = None) -> None:
            async with turns:
                await keeper.start(config)

        if self._compiles:
            await first.start(config)
        try:
            async with asyncio.TaskGroup() as tasks:
                if not self._compiles:
                    tasks.create_task(start(first, config))
                for keeper in others:
                    tasks.create_task(start(keeper))
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None
        self._model = self.shards[0].info

    async def keep(self, followers: Followers) -> None:
        """Put another core in the place of each that dies, until cancelled.

        Raises CoreFailed if one dies before `settle`.
        """
        try:
            async with asyncio.TaskGroup() as tasks:
                for keeper in self._keepers.values():
                    tasks.create_task(keeper.keep(followers))
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None

    def settle(self) -> None:
        """The gateway serves: it goes on when a core dies."""
        for keeper in self._keepers.values():
            keeper.settled = True

    def take_slots(self) -> list[ClientSlot]:
        """A fresh slot of each shard that is up, for a worker. One that has none left is renewed
        soon, and offers itself then. Raises SlotsUsedUp if none of them has."""
        up = [keeper for keeper in self._keepers.values() if keeper.state is KeeperState.UP]
        fresh = [keeper for keeper in up if keeper.slots_left]
        if up and not fresh:
            raise SlotsUsedUp("all client slots of all shards are used up")
        return [keeper.take_slot() for keeper in fresh]

    async def abort_client(self, slot: ClientSlot) -> int:
        """Abort what came through this slot, whose process is gone. Returns how many that were.

        Raises ShardUnavailable.
        """
        return await self._keepers[slot.shard].abort_client(slot)

    async def stop(self) -> None:
        """End all cores, in order if they live. `keep` was cancelled."""
        await asyncio.gather(*(keeper.stop() for keeper in self._keepers.values()))
