"""Devices that shards lend to training: which shard makes room for which job, and when.

    a job wants its device -> shard's desk: rest, announce, drain, put away -> the job trains
    it gives it back, or it is recalled -> the shard is up and warm -> it takes requests again

A `Lender` for the jobs. Owned by the control plane, which runs it (ADR 0016).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from typing import Protocol

from gateway.drains import Drains
from gateway.lending_desk import Borrower, Kept, LendingDesk
from gateway.lending_terms import Terms
from trainer.devices import Device
from trainer.events import Notice

LOOK_INTERVAL_S = 0.2
"""How often is looked whether a shard takes requests again."""


class Route(Protocol):
    """Where requests may go; see `engine.pool.ShardPool`."""

    @property
    def lent(self) -> Collection[str]:
        """Shards that are lent, or about to be."""

    @property
    def stays_open(self) -> bool:
        """Whether any takes requests that is not about to be lent."""


class Lending:
    """One desk for each shard whose devices train."""

    def __init__(
        self,
        keepers: Sequence[Kept],
        drains: Drains,
        route: Route,
        terms: Terms,
        shard_of: Callable[[str], str],
    ) -> None:
        """`shard_of` tells which shard serves on a device, by its name; empty: none does, or it
        does not make room."""
        self._route = route
        self._shard_of = shard_of
        self._publishing = 0
        self._desks = {
            keeper.name: LendingDesk(keeper, drains, terms, self._may_take_last)
            for keeper in keepers
        }

    async def run(self) -> None:
        """Lend what is wanted, until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            for desk in self._desks.values():
                tasks.create_task(desk.run())

    def _may_take_last(self) -> bool:
        """Whether nothing is being published: that takes a shard."""
        return not self._publishing

    # --- a Lender for the jobs --------------------------------------------------------------

    def _desk(self, device: Device) -> LendingDesk | None:
        return self._desks.get(self._shard_of(device.name))

    def lends(self, device: Device) -> bool:
        """See `Lender.lends`."""
        return self._desk(device) is not None

    async def borrow(
        self,
        device: Device,
        uid: str,
        tell: Callable[[Notice], Awaitable[object]],
        recall: Callable[[], None],
    ) -> None:
        """See `Lender.borrow`."""
        desk = self._desk(device)
        if desk is not None:
            await desk.borrow(Borrower(uid, device, tell, recall))

    def give_back(self, device: Device, uid: str, *, publishes: bool = False) -> None:
        """See `Lender.give_back`."""
        desk = self._desk(device)
        if desk is not None:
            desk.give_back(uid, serve=publishes and not self._route.stays_open)

    def outage(self, uid: str) -> Notice | None:
        """See `Lender.outage`."""
        notices = (desk.outage(uid) for desk in self._desks.values())
        return next((notice for notice in notices if notice is not None), None)

    async def returned(self, uid: str) -> None:
        """See `Lender.returned`."""
        for desk in self._desks.values():
            await desk.returned(uid)

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        """See `Lender.serving`. Where no shard is open for another reason it is entered at once."""
        self._publishing += 1
        try:
            while self._route.lent and not self._route.stays_open:  # noqa: ASYNC110  # it tells no one
                await asyncio.sleep(LOOK_INTERVAL_S)
            yield
        finally:
            self._publishing -= 1
