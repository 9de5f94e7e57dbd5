"""A core and the host's client of it: started, watched, put to sleep, ended.

start -> attach -> try out -> used -> death | end in order | sleep -> wake
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

from engine.core import ClientSlot, EngineConfig, EngineCore, Environment, Started
from engine.core_death import CoreDeath
from engine.errors import ShardUnavailable
from engine.screening import Screening
from engine.shard import VllmShard
from gateway.inquest import inquest
from gateway.keeper_state import Cause
from gateway.silence import until_silent

logger = logging.getLogger(__name__)

SLEEP_TIMEOUT_S = 180.0
"""How long a core may take to fall asleep or wake up: its weights are copied, and it answers
nothing meanwhile."""


class DrivenCore:
    """Owned by the keeper of its shard, which ends it."""

    def __init__(self, core: EngineCore, stall_timeout_s: float, started: Started) -> None:
        self.core = core
        self.shard: VllmShard | None = None
        """The host's client; None until `attach`."""
        self._stall_timeout_s = stall_timeout_s
        self._started = started

    @classmethod
    async def start(
        cls,
        name: str,
        config: EngineConfig,
        record_path: Path,
        environment: Environment,
        started: Started,
        stall_timeout_s: float,
    ) -> DrivenCore:
        """As `EngineCore.start`, which says what the parameters are. Raises CoreFailed."""
        core = await EngineCore.start(name, config, record_path, environment, started)
        return cls(core, stall_timeout_s, started)

    def attach(self, screening: Screening) -> VllmShard:
        """Drive it, with what passes `screening`. Raises ShardUnavailable."""
        try:
            self.shard = VllmShard.attach(self.core.take_slot(), screening)
        except TimeoutError as error:  # it died just now
            raise ShardUnavailable(self.core.name) from error
        return self.shard

    async def try_out(self) -> None:
        """Tie it to this process, have it write down its steps, and generate one token. Raises
        ShardUnavailable."""
        await self.unless_dead(self._try_out())

    async def _try_out(self) -> None:
        core, shard = self.core, self._driven
        pids = await shard.call_core("gateway_adopt", os.getpid())
        core.adopt(pids)
        for pid in pids:
            self._started(pid, f"core of {core.name}")
        await shard.call_core("gateway_record", str(core.record_path))
        await shard.warm_up()
        logger.info("%s runs in process %d", core.name, pids[0])

    @property
    def _driven(self) -> VllmShard:
        assert self.shard is not None, "it was attached"
        return self.shard

    async def death(self) -> Cause:
        """Wait until the core has ended, or has not answered for too long."""
        ending = asyncio.create_task(self.core.ended())
        silence = asyncio.create_task(_silence(self._driven, self._stall_timeout_s))
        try:
            await asyncio.wait((ending, silence), return_when=asyncio.FIRST_COMPLETED)
            return Cause.DIED if ending.done() or self._driven.broken else Cause.STALLED
        finally:
            await _cancelled(ending, silence)

    async def unless_dead(
        self, work: Coroutine[Any, Any, None], *, may_be_silent: bool = False
    ) -> None:
        """Do `work`, which uses the core. Raises ShardUnavailable if the core dies meanwhile; by
        its silence it is not known to be dead if it may be silent."""
        death = self.core.ended() if may_be_silent else self.death()
        working, dying = asyncio.create_task(work), asyncio.create_task(death)
        try:
            await asyncio.wait((working, dying), return_when=asyncio.FIRST_COMPLETED)
            if not working.done():
                raise ShardUnavailable(self.core.name)
            working.result()
        finally:
            await _cancelled(working, dying)

    async def sleep(self) -> None:
        """Have it give up its GPUs' memory, and keep the weights. Raises ShardUnavailable, and
        what vLLM raises."""
        sleep = self._driven.call_core("gateway_sleep", timeout_s=SLEEP_TIMEOUT_S)
        await self.unless_dead(sleep, may_be_silent=True)

    async def wake(self) -> None:
        """Have it take its GPUs' memory again, without any adapter, and generate one token.
        Raises as `sleep`."""
        wake = self._driven.call_core("gateway_wake", timeout_s=SLEEP_TIMEOUT_S)
        await self.unless_dead(wake, may_be_silent=True)
        await self.unless_dead(self._driven.warm_up())

    async def ended_before(self, event: asyncio.Event) -> bool:
        """Wait for the event; whether the core ended before it."""
        ending = asyncio.create_task(self.core.ended())
        waiting = asyncio.create_task(event.wait())
        try:
            await asyncio.wait((ending, waiting), return_when=asyncio.FIRST_COMPLETED)
            return not waiting.done()
        finally:
            await _cancelled(ending, waiting)

    async def inquest(self, cause: Cause) -> CoreDeath:
        """How it died, and whether what it computed may be to blame."""
        stalled_s = self._stall_timeout_s if cause is Cause.STALLED else None
        return await inquest(self.core, self.shard, stalled_s)

    async def end_in_order(self) -> None:
        """End it as `stop` does, and tell whoever waits for it."""
        await self._stop(in_order=True)
        if self.shard is not None:
            self.shard.declare_dead(crashed=False)
            self.shard.close()

    async def kill(self, death: CoreDeath) -> None:
        """End what is left of it; whoever waits for it is told how it died."""
        if self.shard is not None:
            self.shard.declare_dead(death.crashed)
        await self.stop(in_order=False)

    async def stop(self, *, in_order: bool) -> None:
        """End it, by its own shutdown if that is to be in order. Nobody is told."""
        await self._stop(in_order=in_order)
        if self.shard is not None:
            self.shard.close()

    async def _stop(self, *, in_order: bool) -> None:
        asks = in_order and self.shard is not None
        await self.core.stop(self._ask_to_stop if asks else None)

    async def _ask_to_stop(self) -> None:
        await self._driven.call_core("gateway_stop")

    # --- for workers ------------------------------------------------------------------------

    @property
    def slots_left(self) -> int:
        """Client slots that were never taken."""
        return self.core.slots_left

    def take_slot(self) -> ClientSlot:
        """The next fresh slot. Raises SlotsUsedUp."""
        return self.core.take_slot()

    def issued(self, slot: ClientSlot) -> bool:
        """Whether the slot is one of this core, and not of one before it."""
        return self.core.issued(slot)


async def _silence(shard: VllmShard, timeout_s: float) -> None:
    """Wait until the core has not answered for so long, or has said that it is dead. Time in which
    this process did not run does not count: a machine that was paused has not lost its engines."""

    async def ask() -> None:
        if shard.broken:
            raise ShardUnavailable(shard.name)
        await shard.respond()

    with contextlib.suppress(ShardUnavailable):
        await until_silent(ask, timeout_s, timeout_s)


async def _cancelled(*tasks: asyncio.Task[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
