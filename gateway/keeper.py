"""One shard as the host keeps it: a core that runs, and another one when that dies.

    STARTING -> UP -> DEAD -> REBUILDING -> WARMING -> UP -> ...
                |      ^----------'------------'
                '- to be renewed ---^

A core is dead when its process ended, and also when it does not answer for so long that it never
will: then all its processes are killed first. One that has few client slots left is ended in order.
What belongs on the new one is loaded before anybody may use it (ADR 0010, ADR 0011).
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import time
from collections import deque
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from engine.core import (
    ClientSlot,
    EngineConfig,
    EngineCore,
    EngineOptions,
    Environment,
    Started,
    ignore,
)
from engine.core_death import CoreDeath
from engine.errors import CoreFailed, ShardUnavailable
from engine.screening import Screening
from engine.shard import VllmShard
from gateway import metrics
from gateway.inquest import inquest
from gateway.keeper_state import TRANSITIONS, Cause, KeeperState
from gateway.note import NOTES_KEPT, Note
from gateway.restarts import Restarts

logger = logging.getLogger(__name__)

ASK_INTERVAL_S = 1.0
"""How often a core is asked whether it still answers."""


@dataclass(frozen=True, slots=True)
class Death:
    """The end of a core that nobody asked for."""

    reason: str
    """For people."""
    time_s: float
    """In seconds since the epoch."""


class Followers(Protocol):
    """All who use a shard, and follow its fate."""

    def lose(self, shard: str, death: CoreDeath) -> None:
        """The core is dead: nobody uses it any more, and whoever waits for it is told."""

    async def prepare(self, shard: VllmShard) -> None:
        """Load what belongs on a new core, which nobody uses yet. Raises ShardUnavailable."""

    def admit(self, shard: str, take_slot: Callable[[], ClientSlot]) -> Coroutine[Any, Any, None]:
        """Have all use it, before the first wait; then wait until they do. The slots are for
        workers."""


class ShardKeeper:
    """Keeps one shard up. Owned by the supervisor, which calls `start`, `keep` and `stop`."""

    def __init__(
        self,
        name: str,
        options: EngineOptions,
        environment: Environment,
        stall_timeout_s: float,
        run_dir: Path,
        screening: Screening,
        restarts: Restarts | None = None,
        started: Started = ignore,
    ) -> None:
        """Cores are started in this `environment`, and write down their steps in `run_dir`. One
        that does not answer for `stall_timeout_s` is killed. `screening` is the host's own.
        `started` is told each process of a core."""
        for cause in Cause:
            metrics.shard_restarts.labels(name, cause.value)  # from 0, so that growth is seen
        metrics.crash_suspects.labels(name)
        self.name = name
        self.state = KeeperState.STARTING
        self.since_s = time.time()
        """When it got into that state, in seconds since the epoch."""
        self.restarts = 0
        """Starts of a core in place of another."""
        self.notes: deque[Note] = deque(maxlen=NOTES_KEPT)
        """The newest last."""
        self.shard: VllmShard | None = None
        """The host's client of the core; None while there is none."""
        self.last_death: Death | None = None
        self.next_start_s: float | None = None
        """When the next core is started, in seconds since the epoch, while that is waited for."""
        self.settled = False
        """Whether the gateway serves: until then it ends with any core that dies."""
        self._options = options
        self._environment = environment
        self._stall_timeout_s = stall_timeout_s
        self._run_dir = run_dir
        self._screening = screening
        self._restarts = restarts or Restarts()
        self._started = started
        self._incarnations = itertools.count()
        self._records: list[Path] = []
        """Where the last two cores wrote down their steps. Workers may still read of the one that
        has died when the next one starts."""
        self._core: EngineCore | None = None
        self._renewal: asyncio.Future[None] | None = None
        """Done when the core that was to be renewed is replaced."""
        self._renewal_asked = asyncio.Event()

    @property
    def slots_left(self) -> int:
        """Client slots of the core that were never taken; 0 while there is no core."""
        return 0 if self._core is None else self._core.slots_left

    def move(self, state: KeeperState) -> None:
        """Go to another state. Raises ValueError for a move that is not in TRANSITIONS."""
        if state not in TRANSITIONS[self.state]:
            raise ValueError(f"{self.name} cannot go from {self.state} to {state}")
        self.state = state
        self.since_s = time.time()
        metrics.shard_up.labels(self.name).set(state is KeeperState.UP)

    async def start(self, config: EngineConfig | None = None) -> None:
        """Start the first core. `config` is what the options build. Raises CoreFailed."""
        try:
            await self._build(config)
        except ShardUnavailable as error:
            raise CoreFailed(f"{self.name} ended as soon as it had started") from error
        self.move(KeeperState.UP)
        self._restarts.up()

    async def keep(self, followers: Followers) -> None:
        """Put another core in the place of each that dies, until cancelled.

        Raises CoreFailed, which says how it did, if one dies before `settled` is set.
        """
        while True:
            cause = await self._death_or_renewal()
            ended_s = time.monotonic()
            if cause is Cause.RENEWED:
                await self._renew(followers)
                took_s = time.monotonic() - ended_s
                logger.info("%s was renewed in %.1f s", self.name, took_s)
                self._note(f"was renewed in {took_s:.1f} s")
            else:
                self.move(KeeperState.DEAD)
                reason = await self._bury(followers, cause)
                self.last_death = Death(reason, time.time())
                if not self.settled:
                    raise CoreFailed(f"{self.name} ended: {reason}; the gateway ends with it")
                logger.error("%s ended: %s", self.name, reason)
                self._note(f"ended: {reason}", is_trouble=True)
                await self._replace(followers, cause)
                took_s = time.monotonic() - ended_s
                metrics.engine_recovery.labels(self.name).observe(took_s)
                logger.info("%s is up again after %.1f s", self.name, took_s)
                self._note(f"is up again after {took_s:.1f} s")
            self._renewal_asked.clear()  # also where it died before
            if self._renewal is not None and not self._renewal.done():
                self._renewal.set_result(None)

    async def renew(self) -> None:
        """Have the core, which is up, ended in order and replaced; returns when that is done. What
        still runs there ends with ShardUnavailable."""
        self._renewal = asyncio.get_running_loop().create_future()
        self._renewal_asked.set()
        await self._renewal

    def take_slot(self) -> ClientSlot:
        """A fresh slot of the core, for a worker. Raises SlotsUsedUp."""
        assert self._core is not None, "only a core that runs has slots"
        slot = self._core.take_slot()
        metrics.client_slots_left.labels(self.name).set(self._core.slots_left)
        return slot

    async def abort_client(self, slot: ClientSlot) -> int:
        """Abort what came through this slot, whose process is gone. Returns how many that were.

        Raises ShardUnavailable.
        """
        if self._core is None or self.shard is None or not self._core.issued(slot):
            return 0  # that core is gone, with all that it ran
        return int(await self.shard.call_core("gateway_abort_client", slot.index))

    async def stop(self) -> None:
        """End the core, in order if it lives. `keep` was cancelled."""
        core, shard = self._core, self.shard
        alive = self.state is not KeeperState.DEAD
        if self.state is not KeeperState.STOPPED:
            self.move(KeeperState.STOPPED)
        if core is not None:
            in_order = shard is not None and alive
            await core.stop(self._ask_to_stop if in_order else None)
        if shard is not None:
            shard.close()

    def _note(self, text: str, *, is_trouble: bool = False) -> None:
        self.notes.append(Note(time.time(), text, is_trouble))

    async def _ask_to_stop(self) -> None:
        assert self.shard is not None
        await self.shard.call_core("gateway_stop")

    async def _build(self, config: EngineConfig | None = None) -> VllmShard:
        """Start a core, drive it, and generate one token. Raises CoreFailed, ShardUnavailable."""
        if config is None:
            config = await asyncio.to_thread(self._options.build_config)
        record_path = self._next_record()
        self._core = core = await EngineCore.start(
            self.name, config, record_path, self._environment, self._started
        )
        try:
            self.shard = shard = VllmShard.attach(core.take_slot(), self._screening)
        except TimeoutError as error:  # it died just now
            raise ShardUnavailable(self.name) from error

        async def try_out() -> None:
            pids = await shard.call_core("gateway_adopt", os.getpid())
            core.adopt(pids)
            for pid in pids:
                self._started(pid, f"core of {self.name}")
            await shard.call_core("gateway_record", str(record_path))
            await shard.warm_up()
            logger.info("%s runs in process %d", self.name, pids[0])

        await self._unless_dead(try_out())
        return shard

    def _next_record(self) -> Path:
        """A place for the steps of the next core."""
        if len(self._records) == 2:
            self._records.pop(0).unlink(missing_ok=True)
        self._records.append(self._run_dir / f"{self.name}-{next(self._incarnations)}.steps")
        return self._records[-1]

    async def _death(self) -> Cause:
        """Wait until the core has ended, or has not answered for too long."""
        assert self._core is not None and self.shard is not None
        ending = asyncio.create_task(self._core.ended())
        silence = asyncio.create_task(_silence(self.shard, self._stall_timeout_s))
        try:
            await asyncio.wait((ending, silence), return_when=asyncio.FIRST_COMPLETED)
            return Cause.DIED if ending.done() or self.shard.broken else Cause.STALLED
        finally:
            ending.cancel()
            silence.cancel()
            await asyncio.gather(ending, silence, return_exceptions=True)

    async def _death_or_renewal(self) -> Cause:
        dying = asyncio.create_task(self._death())
        asked = asyncio.create_task(self._renewal_asked.wait())
        try:
            await asyncio.wait((dying, asked), return_when=asyncio.FIRST_COMPLETED)
            return dying.result() if dying.done() else Cause.RENEWED
        finally:
            for task in (dying, asked):
                task.cancel()
            await asyncio.gather(dying, asked, return_exceptions=True)

    async def _unless_dead(self, work: Coroutine[Any, Any, None]) -> None:
        """Do `work`, which uses the core. Raises ShardUnavailable if the core dies meanwhile."""
        working, dying = asyncio.create_task(work), asyncio.create_task(self._death())
        try:
            await asyncio.wait((working, dying), return_when=asyncio.FIRST_COMPLETED)
            if not working.done():
                raise ShardUnavailable(self.name)
            working.result()
        finally:
            working.cancel()
            dying.cancel()
            await asyncio.gather(working, dying, return_exceptions=True)

    async def _bury(self, followers: Followers, cause: Cause) -> str:
        """Tell all, and end what is left of the core. Returns how it ended, for people."""
        shard, self.shard = self.shard, None
        core, self._core = self._core, None
        death = CoreDeath("it did not start")
        if core is not None:
            stalled_s = self._stall_timeout_s if cause is Cause.STALLED else None
            death = await inquest(core, shard, stalled_s)
        followers.lose(self.name, death)
        if shard is not None:
            shard.declare_dead(death.crashed)
        if cause is Cause.STALLED:
            logger.error("%s has not answered for %g s: killed", self.name, self._stall_timeout_s)
        if core is not None:
            await core.stop()
        if shard is not None:
            shard.close()
        return death.reason

    async def _renew(self, followers: Followers) -> None:
        """End the core in order, and start another one."""
        self.move(KeeperState.REBUILDING)  # nobody takes a slot of it any more
        followers.lose(self.name, CoreDeath("it is renewed"))
        shard, core = self.shard, self._core
        assert shard is not None and core is not None
        await core.stop(self._ask_to_stop)
        self.shard = self._core = None
        shard.declare_dead(crashed=False)
        shard.close()
        if not await self._start_again(followers, Cause.RENEWED):
            await self._replace(followers, Cause.START_FAILED)

    async def _replace(self, followers: Followers, cause: Cause) -> None:
        """Start cores until one is up."""
        while True:
            delay_s = self._restarts.died()
            if self._restarts.breaker_open:
                logger.critical("%s dies again and again; next try in %g s", self.name, delay_s)
                self.next_start_s = time.time() + delay_s
            await asyncio.sleep(delay_s)
            self.next_start_s = None
            self.move(KeeperState.REBUILDING)
            if await self._start_again(followers, cause):
                return
            cause = Cause.START_FAILED

    async def _start_again(self, followers: Followers, cause: Cause) -> bool:
        """Whether another core is up. If not, the shard is DEAD."""
        metrics.shard_restarts.labels(self.name, cause.value).inc()
        self.restarts += 1
        try:
            await self._revive(followers)
            return True
        except (CoreFailed, ShardUnavailable) as error:
            reason = f"could not be started again: {error}"
            logger.error("%s %s", self.name, reason)
        except Exception:  # whatever it is, the other shards serve on
            reason = "could not be started again; the log says why"
            logger.exception("%s could not be started again", self.name)
        self._note(reason, is_trouble=True)
        self.last_death = Death(reason, time.time())
        self.move(KeeperState.DEAD)
        await self._bury(followers, Cause.START_FAILED)
        return False

    async def _revive(self, followers: Followers) -> None:
        shard = await self._build()
        self.move(KeeperState.WARMING)
        await self._unless_dead(followers.prepare(shard))

        async def admit() -> None:
            # No step in between: a worker gets its slot with its orders from now on, and those
            # who have theirs get one here.
            self.move(KeeperState.UP)
            self._restarts.up()
            await followers.admit(self.name, self.take_slot)

        await self._unless_dead(admit())


async def _silence(shard: VllmShard, timeout_s: float) -> None:
    """Wait until the core has not answered for so long, or has said that it is dead."""
    while not shard.broken and await shard.answers(timeout_s):  # noqa: ASYNC110  # it tells no one
        await asyncio.sleep(ASK_INTERVAL_S)
