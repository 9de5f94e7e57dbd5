"""One shard as the host keeps it: a core that runs, and another one when that dies.

    STARTING -> UP -> DEAD -> REBUILDING -> WARMING -> UP -> ...
                |      ^----------'------------'
                |- to be renewed ---^            |
                '- its device is wanted -> LENT -'  (asleep; if it ended: REBUILDING)

A core is dead when its process ended, and also when it does not answer for so long that it never
will: then all its processes are killed first. One that has few client slots left is ended in order.
What belongs on the new one is loaded before anybody may use it (ADR 0010, ADR 0011). One whose
device is lent sleeps where that is a GPU, and ends where it is not (ADR 0016).
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path

from engine.core import (
    ClientSlot,
    EngineConfig,
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
from gateway.driven_core import DrivenCore
from gateway.followers import Followers
from gateway.keeper_state import TRANSITIONS, Cause, KeeperState
from gateway.loan import Loan
from gateway.note import NOTES_KEPT, Note
from gateway.renewal import LOW_SLOTS
from gateway.restarts import Restarts

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Death:
    """The end of a core that nobody asked for."""

    reason: str
    """For people."""
    time_s: float
    """In seconds since the epoch."""


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
        self._core: DrivenCore | None = None
        self._renewal: asyncio.Future[None] | None = None
        """Done when the core that was to be renewed is replaced."""
        self._wish = asyncio.Event()
        """Set when something is asked of a core that is up."""
        self._loan: Loan | None = None

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
            cause = await self._death_or_wish()
            ended_s = time.monotonic()
            if cause is Cause.LENT and self._loan is not None:
                loan, self._loan = self._loan, None
                await self._lend(followers, loan)
            elif cause is Cause.RENEWED:
                await self._renew(followers)
                took_s = time.monotonic() - ended_s
                logger.info("%s was renewed in %.1f s", self.name, took_s)
                self.note(f"was renewed in {took_s:.1f} s")
            else:
                self.move(KeeperState.DEAD)
                reason = await self._bury(followers, cause)
                self.last_death = Death(reason, time.time())
                if not self.settled:
                    raise CoreFailed(f"{self.name} ended: {reason}; the gateway ends with it")
                logger.error("%s ended: %s", self.name, reason)
                self.note(f"ended: {reason}", is_trouble=True)
                await self._replace(followers, cause)
                took_s = time.monotonic() - ended_s
                metrics.engine_recovery.labels(self.name).observe(took_s)
                logger.info("%s is up again after %.1f s", self.name, took_s)
                self.note(f"is up again after {took_s:.1f} s")
            if self._loan is None:  # one that was asked for is lent as soon as it is up
                self._wish.clear()
            if self._renewal is not None and not self._renewal.done():
                self._renewal.set_result(None)  # also where it died before

    async def renew(self) -> None:
        """Have the core, which is up, ended in order and replaced; returns when that is done. What
        still runs there ends with ShardUnavailable."""
        self._renewal = asyncio.get_running_loop().create_future()
        self._wish.set()
        await self._renewal

    def lend(self) -> Loan:
        """Have the core let go of its device as soon as it is up. What runs there then ends with
        ShardUnavailable."""
        self._loan = loan = Loan()
        self._wish.set()
        return loan

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
        core = self._core
        alive = self.state is not KeeperState.DEAD
        if self.state is not KeeperState.STOPPED:
            self.move(KeeperState.STOPPED)
        if core is not None:
            await core.stop(in_order=alive)

    def note(self, text: str, *, is_trouble: bool = False) -> None:
        """Write down what happened, for people."""
        self.notes.append(Note(time.time(), text, is_trouble))

    async def _build(self, config: EngineConfig | None = None) -> VllmShard:
        """Start a core, drive it, and generate one token. Raises CoreFailed, ShardUnavailable."""
        if config is None:
            config = await asyncio.to_thread(self._options.build_config)
        self._core = core = await DrivenCore.start(
            *(self.name, config, self._next_record(), self._environment),
            *(self._started, self._stall_timeout_s),
        )
        self.shard = shard = core.attach(self._screening)
        await core.try_out()
        return shard

    def _next_record(self) -> Path:
        """A place for the steps of the next core."""
        if len(self._records) == 2:
            self._records.pop(0).unlink(missing_ok=True)
        self._records.append(self._run_dir / f"{self.name}-{next(self._incarnations)}.steps")
        return self._records[-1]

    async def _death_or_wish(self) -> Cause:
        assert self._core is not None
        dying = asyncio.create_task(self._core.death())
        asked = asyncio.create_task(self._wish.wait())
        try:
            await asyncio.wait((dying, asked), return_when=asyncio.FIRST_COMPLETED)
            if dying.done():
                return dying.result()
            return Cause.RENEWED if self._loan is None else Cause.LENT
        finally:
            for task in (dying, asked):
                task.cancel()
            await asyncio.gather(dying, asked, return_exceptions=True)

    async def _bury(self, followers: Followers, cause: Cause) -> str:
        """Tell all, and end what is left of the core. Returns how it ended, for people."""
        core, self._core, self.shard = self._core, None, None
        death = CoreDeath("it did not start") if core is None else await core.inquest(cause)
        followers.lose(self.name, death)
        if cause is Cause.STALLED:
            logger.error("%s has not answered for %g s: killed", self.name, self._stall_timeout_s)
        if core is not None:
            await core.kill(death)
        return death.reason

    async def _renew(self, followers: Followers) -> None:
        """End the core in order, and start another one."""
        self.move(KeeperState.REBUILDING)  # nobody takes a slot of it any more
        followers.lose(self.name, CoreDeath("it is renewed"))
        await self._end_in_order()
        if not await self._start_again(followers, Cause.RENEWED):
            await self._replace(followers, Cause.START_FAILED)

    async def _end_in_order(self) -> None:
        core, self._core, self.shard = self._core, None, None
        assert core is not None
        await core.end_in_order()

    # --- a device that is lent --------------------------------------------------------------

    async def _lend(self, followers: Followers, loan: Loan) -> None:
        """Let go of the device until the loan is over, and be up again then."""
        self.move(KeeperState.LENT)
        followers.lose(self.name, CoreDeath("its device is lent"))
        loan.begun.set_result(await self._put_away(followers))
        await self._rest(followers, loan)
        if self._core is None:
            self.move(KeeperState.REBUILDING)
            if not await self._start_again(followers, Cause.LENT):
                await self._replace(followers, Cause.START_FAILED)
        elif not await self._wake(followers):
            await self._replace(followers, Cause.DIED)
        loan.ended.set_result(None)

    async def _put_away(self, followers: Followers) -> bool:
        """Whether the core sleeps; else it has ended. One with few client slots is not worth
        waking: workers take slots of it again then, and another one has to come soon."""
        assert self._core is not None
        if not (self._options.sleeps and self.slots_left > LOW_SLOTS):
            await self._end_in_order()
            return False
        try:
            await self._core.sleep()
        except Exception as error:  # awake it would keep the device
            logger.error("%s does not fall asleep, and is ended: %r", self.name, error)
            await self._bury(followers, Cause.DIED)
            return False
        return True

    async def _rest(self, followers: Followers, loan: Loan) -> None:
        """Until the loan is over. Nobody misses a core before that which dies in its sleep."""
        if self._core is not None and await self._core.ended_before(loan.over):
            reason = f"ended in its sleep: {await self._bury(followers, Cause.DIED)}"
            self.last_death = Death(reason, time.time())
            logger.error("%s %s", self.name, reason)
            self.note(reason, is_trouble=True)
        await loan.over.wait()

    async def _wake(self, followers: Followers) -> bool:
        """Whether the core is up again; if not, the shard is DEAD."""
        assert self._core is not None and self.shard is not None
        try:
            await self._core.wake()
            await self._open(followers, self.shard)
            return True
        except Exception as error:
            logger.error("%s could not be woken up: %r", self.name, error)
            await self._give_up(followers, f"could not be woken up: {error}")
        return False

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
            await self._open(followers, await self._build())
            return True
        except (CoreFailed, ShardUnavailable) as error:
            reason = f"could not be started again: {error}"
            logger.error("%s %s", self.name, reason)
        except Exception:  # whatever it is, the other shards serve on
            reason = "could not be started again; the log says why"
            logger.exception("%s could not be started again", self.name)
        await self._give_up(followers, reason)
        return False

    async def _give_up(self, followers: Followers, reason: str) -> None:
        """The core is of no use: the shard is DEAD."""
        self.note(reason, is_trouble=True)
        self.last_death = Death(reason, time.time())
        self.move(KeeperState.DEAD)
        await self._bury(followers, Cause.START_FAILED)

    async def _open(self, followers: Followers, shard: VllmShard) -> None:
        """Have a core that runs warm, and used by all. Raises ShardUnavailable."""
        assert self._core is not None
        self.move(KeeperState.WARMING)
        await self._core.unless_dead(followers.prepare(shard))

        async def admit() -> None:
            # No step in between: a worker gets its slot with its orders from now on, and those
            # who have theirs get one here.
            self.move(KeeperState.UP)
            self._restarts.up()
            await followers.admit(self.name, self.take_slot)

        await self._core.unless_dead(admit())
