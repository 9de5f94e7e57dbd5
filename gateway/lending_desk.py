"""One shard that lends its devices: when it may, what it tells, and what that cost.

wanted -> rested -> announced -> drained -> put away -> lent -> wanted back -> up -> open
                                                         '- jobs come and go
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Protocol

from gateway import metrics
from gateway.drains import Drains, Wish
from gateway.exceptions import LastOpenShard
from gateway.keeper_state import KeeperState
from gateway.lending_terms import Terms
from gateway.lent_memory import LentMemory
from gateway.loan import Loan
from trainer.devices import Device
from trainer.events import Notice

logger = logging.getLogger(__name__)

LOOK_INTERVAL_S = 1.0
"""How often is looked again whether a shard may be lent."""
LINGER_S = 0.3
"""How long a device that is given back waits for a job that follows at once."""
RETURN_POLL_S = 0.2
"""How often a job that has ended looks whether the shard serves again."""
OUTAGES_KEPT = 64
TELL_TIMEOUT_S = 5.0
"""How long an announcement may take."""


@dataclass(frozen=True, slots=True)
class Borrower:
    """A job that wants a device of the shard, or has it."""

    uid: str
    device: Device
    tell: Callable[[Notice], Awaitable[object]]
    recall: Callable[[], None]
    has_it: asyncio.Event = field(default_factory=asyncio.Event)


class Kept(Protocol):
    """A shard that can be lent; see ShardKeeper."""

    name: str
    state: KeeperState

    def lend(self) -> Loan:
        """Have the core let go of its device as soon as it is up."""

    def note(self, text: str, *, is_trouble: bool = False) -> None:
        """Write down what happened, for people."""


class LendingDesk:
    """Owned by `Lending`, which runs it."""

    def __init__(
        self, keeper: Kept, drains: Drains, terms: Terms, may_take_last: Callable[[], bool]
    ) -> None:
        """`may_take_last` tells whether nobody needs a shard just now."""
        self._keeper = keeper
        self._name = keeper.name
        self._drains = drains
        self._terms = terms
        self._may_take_last = may_take_last
        self._waiting: dict[str, Borrower] = {}
        """By uid."""
        self._users: dict[str, Borrower] = {}
        self._outages: dict[str, Notice] = {}
        """What loans cost that were not told yet."""
        self._used: set[str] = set()
        """Jobs that had it since it was lent last."""
        self._changed = asyncio.Event()
        self._lent = False
        """Whether jobs may join."""
        self.serves = True
        """Whether the shard is not lent, nor about to be or to come back."""
        self._serves_since_s = 0.0
        """On the monotonic clock."""
        metrics.shard_lent.labels(self._name).set(0)

    # --- for jobs ---------------------------------------------------------------------------

    async def borrow(self, borrower: Borrower) -> None:
        """See `Lender.borrow`."""
        if borrower.uid in self._users:
            return
        self._waiting[borrower.uid] = borrower
        self._changed.set()
        try:
            if self._lent:
                await self._tell(borrower, self._joined(borrower))
            await borrower.has_it.wait()
        except asyncio.CancelledError:
            self._waiting.pop(borrower.uid, None)
            self._users.pop(borrower.uid, None)
            self._changed.set()
            raise

    def give_back(self, uid: str, *, serve: bool) -> None:
        """See `Lender.give_back`; `serve`: the shard is to serve before another job has it."""
        if self._users.pop(uid, None) is not None:
            self._lent &= not serve
            self._changed.set()

    def outage(self, uid: str) -> Notice | None:
        """See `Lender.outage`."""
        return self._outages.pop(uid, None)

    async def returned(self, uid: str) -> None:
        """See `Lender.returned`."""
        while uid in self._used and not self._users and not self.serves:  # noqa: ASYNC110
            await asyncio.sleep(RETURN_POLL_S)

    # --- the owner --------------------------------------------------------------------------

    async def run(self) -> None:
        """Lend whenever a job wants the device and the terms allow it, until cancelled."""
        self._serves_since_s = time.monotonic()  # a gateway that starts has not served for a while
        while True:
            self._changed.clear()
            if not self._waiting:
                await self._changed.wait()
                continue
            try:
                await asyncio.sleep(self._rest_left_s())
                if not self._waiting:
                    continue
                if self._may_lend():
                    await self._lend()
                    continue
            except LastOpenShard:  # since it was looked at
                pass
            except Exception:  # the gateway serves on, and it is tried again
                logger.exception("%s cannot be lent", self._name)
            await asyncio.sleep(LOOK_INTERVAL_S)

    def _rest_left_s(self) -> float:
        return max(0.0, self._serves_since_s + self._terms.rest_s - time.monotonic())

    def _may_lend(self) -> bool:
        if self._keeper.state is not KeeperState.UP:
            return False
        if not self._drains.is_last(self._name):
            return True
        return self._terms.takes_last and self._may_take_last()

    async def _lend(self) -> None:
        """One loan, from its announcement until the shard takes requests again."""
        terms, name = self._terms, self._name
        is_last = self._drains.is_last(name)
        await self._announce(is_last)
        await self._drains.drain(
            name, wish=Wish.LENDING, even_last=terms.takes_last, notice_s=terms.notice_s
        )
        drained_s = time.monotonic()
        self.serves = False
        self._used.clear()
        metrics.shard_lent.labels(name).set(1)
        loan, memory = None, LentMemory()
        try:
            await self._until_idle()
            before_bytes = await self._free_bytes(memory)
            loan = self._keeper.lend()
            sleeps = await asyncio.shield(loan.begun)
            freed_gib = (await self._free_bytes(memory) - before_bytes) / 1024**3
            how = "sleeps" if sleeps else "has ended"
            took_s = time.monotonic() - drained_s
            logger.info("%s: its engine %s after %.1f s", name, how, took_s)
            if sleeps:
                logger.info("%s: that freed %.1f GiB of GPU memory", name, freed_gib)
            await self._until_wanted_back(memory)
            await memory.until_free()
        except Exception:  # it is to serve in any case
            logger.exception("%s could not be lent", name)
        self._lent = False
        if loan is not None:
            loan.over.set()
            await asyncio.shield(loan.ended)
        await self._drains.resume(name, wish=Wish.LENDING)
        self._tell_outage(time.monotonic() - drained_s, is_last)

    async def _announce(self, is_last: bool) -> None:
        """Say what is about to happen, before anybody notices."""
        begin_s = time.time() + (self._terms.notice_s if is_last else 0.0)
        begin = datetime.fromtimestamp(begin_s, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        effect = (
            "calls of Inference are refused with SHARD_LENT"
            if is_last
            else "its requests go to the other shards"
        )
        limit_s = self._terms.limit_s
        end = "the job leaves it" if limit_s is None else f"{limit_s:g} s later at the latest"
        borrowers = [*self._waiting.values()]
        devices = ", ".join(sorted({borrower.device.name for borrower in borrowers}))
        text = f"{self._name} lends {devices} to training: from {begin} on {effect}, until {end}"
        logger.warning("%s", text)
        self._keeper.note(text)
        notice = Notice(code="DEVICE_LENT", message=text)
        await asyncio.gather(*(self._tell(borrower, notice) for borrower in borrowers))

    async def _tell(self, borrower: Borrower, notice: Notice) -> None:
        try:
            async with asyncio.timeout(TELL_TIMEOUT_S):
                await borrower.tell(notice)
        except Exception as error:  # the log has it, and the job may be gone
            logger.warning("job %s could not be told: %r", borrower.uid, error)

    async def _until_idle(self) -> None:
        """Wait until nothing runs on the shard, but not for ever."""
        grace_s = self._terms.grace_s
        try:
            async with asyncio.timeout(grace_s):
                await self._drains.until_idle(self._name)
        except TimeoutError:
            logger.warning("%s: what still runs there after %g s is cut", self._name, grace_s)

    async def _free_bytes(self, memory: LentMemory) -> int:
        devices = {borrower.device for borrower in self._waiting.values()}
        return sum([await memory.free_bytes(device) for device in devices])

    async def _until_wanted_back(self, memory: LentMemory) -> None:
        """Let jobs in, until none is left or the limit is reached and all have gone."""
        self._lent = True
        limit_s = self._terms.limit_s
        end_s = None if limit_s is None else asyncio.get_running_loop().time() + limit_s
        while True:
            self._changed.clear()
            if self._lent:
                await self._let_in(memory)
            if not self._users and not self._lent:
                return
            wake_s = end_s if self._lent else None
            if not self._users:
                wake_s = asyncio.get_running_loop().time() + LINGER_S
            try:
                async with asyncio.timeout_at(wake_s):
                    await self._changed.wait()
            except TimeoutError:
                self._recall()

    async def _let_in(self, memory: LentMemory) -> None:
        for borrower in [*self._waiting.values()]:
            await memory.let_in(borrower.device)
            if self._waiting.pop(borrower.uid, None) is not None:
                self._users[borrower.uid] = borrower
                self._used.add(borrower.uid)
                borrower.has_it.set()

    def _recall(self) -> None:
        """Nobody is let in any more, and those who are in are to go."""
        self._lent = False
        for borrower in self._users.values():
            logger.warning("%s wants %s back", self._name, borrower.device.name)
            borrower.recall()

    def _joined(self, borrower: Borrower) -> Notice:
        text = f"{self._name} has lent {borrower.device.name} already, and stays out of service"
        return Notice(code="DEVICE_LENT", message=text)

    def _tell_outage(self, outage_s: float, is_last: bool) -> None:
        """Say that it is over, and what it cost."""
        name = self._name
        metrics.shard_lent.labels(name).set(0)
        metrics.shard_lent_duration.labels(name).observe(outage_s)
        effect = (
            "calls were refused for that long"
            if is_last
            else "the other shards took its requests for that long"
        )
        text = f"{name} takes requests again after {outage_s:.1f} s: {effect}"
        logger.warning("%s", text)
        self._keeper.note(text)
        for uid in self._used:
            self._outages[uid] = Notice(code="DEVICE_RETURNED", message=text)
        while len(self._outages) > OUTAGES_KEPT:  # of jobs that ended before they were told
            del self._outages[next(iter(self._outages))]
        self._serves_since_s = time.monotonic()
        self.serves = True
