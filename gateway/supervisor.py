"""The supervisor: all shards of the host, from their start to their end."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from engine.core import ClientSlot, EngineConfig
from engine.shard import ModelInfo, VllmShard
from gateway.keeper import ShardKeeper

STARTS_AT_ONCE = 8
"""Cores that load at the same time. Each has a thread of the host's wait for it."""


class Supervisor:
    """Starts, watches and ends the cores. Owned by the host, which calls `stop`."""

    def __init__(self, keepers: Iterable[ShardKeeper]) -> None:
        self._keepers = {keeper.name: keeper for keeper in keepers}

    @property
    def shards(self) -> list[VllmShard]:
        """The host's clients of the cores that run."""
        keepers = self._keepers.values()
        return [keeper.shard for keeper in keepers if keeper.shard is not None]

    @property
    def dead(self) -> list[str]:
        """Shards whose core ended by itself."""
        return [keeper.name for keeper in self._keepers.values() if keeper.dead]

    @property
    def model(self) -> ModelInfo:
        """What each shard serves."""
        return self.shards[0].info

    async def start(self, config: EngineConfig) -> None:
        """Start all cores. `config` is the first one's.

        The first fills the caches of compiled code, and the others start beside each other.
        Raises CoreFailed for the first that cannot start; the others are ended then.
        """
        first, *others = self._keepers.values()
        await first.start(config)
        turns = asyncio.Semaphore(STARTS_AT_ONCE)

        async def start(keeper: ShardKeeper) -> None:
            async with turns:
                await keeper.start()

        try:
            async with asyncio.TaskGroup() as tasks:
                for keeper in others:
                    tasks.create_task(start(keeper))
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None

    async def watch(self) -> None:
        """Raises CoreFailed when a core ends by itself."""
        try:
            async with asyncio.TaskGroup() as tasks:
                for keeper in self._keepers.values():
                    tasks.create_task(keeper.watch())
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None

    def take_slots(self) -> list[ClientSlot]:
        """A fresh slot of each core, for a worker. Raises SlotsUsedUp."""
        return [keeper.take_slot() for keeper in self._keepers.values()]

    async def abort_client(self, slot: ClientSlot) -> int:
        """Abort what came through this slot, whose process is gone. Returns how many that were.

        Raises ShardUnavailable.
        """
        shard = self._keepers[slot.shard].shard
        assert shard is not None, "a slot is of a core that runs"
        return int(await shard.call_core("gateway_abort_client", slot.index))

    async def stop(self) -> None:
        """End all cores, in order if they live."""
        await asyncio.gather(*(keeper.stop() for keeper in self._keepers.values()))
