"""The cores that one worker drives: attached, lost, and attached again.

slot -> attach -> warm up -> the pool places requests there -> lose -> let go
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Callable, Sequence
from functools import partial

from engine.core import ClientSlot
from engine.errors import ShardUnavailable
from engine.generation import ServedVersion, VersionKey
from engine.pool import ShardPool
from engine.residents import Residents
from engine.screening import Screening
from engine.shard import VllmShard
from engine.slot_holds import SlotHolds
from gateway import metrics
from gateway.messages import WaitsForSlot, Want, WentIdle

logger = logging.getLogger(__name__)

UNHEARD_S = 10.0
"""How long a shard may be silent here after the host should have said that its core died. If it
never does, the core lives, and only this process cannot hear it."""


class Attachments:
    """One worker's clients of the cores. Owned by the worker, which runs `watch` and calls
    `close`."""

    def __init__(
        self,
        pool: ShardPool,
        screening: Screening,
        tell_host: Callable[[Want | WaitsForSlot | WentIdle], None],
        lost: Callable[[str], None],
        stall_timeout_s: float,
    ) -> None:
        """Shards join and leave `pool`, and get what passes `screening`. `tell_host` says what
        requests wait for; `lost` is told of each shard that is gone, after it has left. The host
        takes `stall_timeout_s` to find that a core hangs."""
        self._pool = pool
        self._screening = screening
        self._tell_host = tell_host
        self._tell_lost = lost
        self._unheard_limit_s = stall_timeout_s + UNHEARD_S
        self._shards: dict[str, VllmShard] = {}
        self._residents: dict[str, Residents] = {}
        self._lost: list[tuple[VllmShard, Residents]] = []
        """Of cores that died, to be closed when their calls have ended."""
        self._unheard: dict[str, float] = {}
        """Since when shards cannot be heard of which the host has not said that they died."""
        self._unjudged: dict[str, VllmShard] = {}
        """The last of each that were lost before the host said so."""

    def residents(self, shard: str) -> Residents | None:
        """What a shard has loaded; None if it is not attached."""
        return self._residents.get(shard)

    def attach(
        self, slot: ClientSlot, resident: Sequence[ServedVersion], granted: Sequence[VersionKey]
    ) -> VllmShard | None:
        """Drive a core, which has these versions loaded, and slots for some; no request is sent
        there yet. Takes some 20 ms of the event loop.

        None if it does not greet: it died just now, and the host says so if that is true.
        """
        try:
            shard = VllmShard.attach(slot, self._screening)
        except TimeoutError as error:
            logger.error("cannot attach to %s: %s", slot.shard, error)
            self._unheard[slot.shard] = time.monotonic()
            return None
        residents = self._residents_of(shard)
        residents.all_loaded(resident)
        residents.slots.all_granted(granted)
        self._shards[shard.name] = shard
        self._residents[shard.name] = residents
        return shard

    def _residents_of(self, shard: VllmShard) -> Residents:
        name, tell, pid = shard.name, self._tell_host, os.getpid()
        slots = SlotHolds(
            lambda key, waits: tell(WaitsForSlot(name, key, pid, waits)),
            shard.requests_of,
            partial(metrics.observe_slot_wait, name),
        )
        return Residents(
            lambda key: tell(Want(name, key)),
            shard.requests_of,
            slots,
            lambda: tell(WentIdle(name)),
        )

    def join(self, shard: VllmShard) -> bool:
        """Send requests there from now on. False if it was lost meanwhile."""
        if self._shards.get(shard.name) is not shard:
            return False
        self._pool.join(shard, self._residents[shard.name])
        return True

    async def warm_up(self) -> None:
        """Generate a token on each."""
        for shard in [*self._shards.values()]:
            with contextlib.suppress(ShardUnavailable):  # the others serve, and the host knows
                await shard.warm_up()

    def lose(self, name: str, crashed: bool) -> None:
        """The host says that this core is dead, and whether what it computed may be to blame."""
        self._unheard.pop(name, None)
        unjudged = self._unjudged.pop(name, None)
        self._lose(name, crashed)
        if unjudged is not None:
            unjudged.judge(crashed)

    def _lose(self, name: str, crashed: bool | None = None) -> None:
        """Calls without a token are tried again by those who wait for them."""
        shard = self._shards.pop(name, None)
        if shard is None:
            return
        self._pool.leave(name)
        residents = self._residents.pop(name)
        residents.lose(name)
        if crashed is None:
            self._unjudged[name] = shard
        shard.declare_dead(crashed)
        self._lost.append((shard, residents))
        self._tell_lost(name)

    async def watch(self) -> None:
        """Once a second: let go of shards that are gone, and find those that cannot be heard."""
        while True:
            await asyncio.sleep(1.0)
            lost, self._lost = self._lost, []
            for shard, residents in lost:
                await residents.close()
                shard.close()
            for shard in [*self._shards.values()]:
                if shard.broken:  # its core has died, or vLLM's output task here
                    self._unheard[shard.name] = time.monotonic()
                    self._lose(shard.name)
            for name, since_s in self._unheard.items():
                if time.monotonic() - since_s > self._unheard_limit_s:
                    logger.critical("cannot hear %s any more; the standby takes over", name)
                    os._exit(1)

    async def close(self) -> None:
        """Let go of all."""
        for residents in self._residents.values():
            await residents.close()

    def let_go(self) -> None:
        """Close the clients, which blocks for a moment. Nothing uses them any more."""
        for shard in (*self._shards.values(), *(shard for shard, _ in self._lost)):
            shard.close()
