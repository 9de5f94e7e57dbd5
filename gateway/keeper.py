"""One shard as the host keeps it: its core, and the host's own way into it."""

from __future__ import annotations

import asyncio
import os

from engine.core import ClientSlot, EngineConfig, EngineCore, EngineOptions, Environment
from engine.errors import CoreFailed
from engine.shard import VllmShard
from gateway import metrics


class ShardKeeper:
    """Starts one core, watches it and ends it."""

    def __init__(self, name: str, options: EngineOptions, environment: Environment) -> None:
        """The core is started in this `environment`."""
        self.name = name
        self.dead = False
        """Whether the core ended by itself."""
        self.shard: VllmShard | None = None
        """The host's client of the core, once that runs."""
        self._options = options
        self._environment = environment
        self._core: EngineCore | None = None
        self._started = asyncio.Event()

    async def start(self, config: EngineConfig | None = None) -> VllmShard:
        """Start the core, drive it, and generate one token. `config` is what its options build.

        Raises CoreFailed.
        """
        if config is None:
            config = await asyncio.to_thread(self._options.build_config)
        self._core = core = await EngineCore.start(self.name, config, self._environment)
        self.shard = shard = VllmShard.attach(core.take_slot())
        self._started.set()
        await shard.call_core("gateway_adopt", os.getpid())
        await shard.warm_up()
        return shard

    async def watch(self) -> None:
        """Wait for the core to end by itself, and raise CoreFailed, which says how it did."""
        await self._started.wait()
        assert self._core is not None and self.shard is not None
        await self._core.ended()
        self.dead = True
        self.shard.declare_dead()  # a client cannot see it by itself
        reason = await asyncio.to_thread(self._core.exit_reason)
        raise CoreFailed(f"{self.name} ended: {reason}; the gateway ends with it")

    def take_slot(self) -> ClientSlot:
        """A fresh slot of the core, for a worker. Raises SlotsUsedUp."""
        assert self._core is not None
        slot = self._core.take_slot()
        metrics.client_slots_left.labels(self.name).set(self._core.slots_left)
        return slot

    async def stop(self) -> None:
        """End the core, in order if it lives."""
        if self._core is not None and (shard := self.shard) is not None:
            await self._core.stop(lambda: shard.call_core("gateway_stop"))
            shard.close()
