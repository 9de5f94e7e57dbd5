"""Devices that serve and train: whoever serves on one lends it for as long as a job trains there.

    queue -> borrow: what serves there is told, ends, and lets go -> attempt -> give back -> serves

The device queue decides which job has a device. A lender decides when it is free of serving, and
may want it back before the job is done.
"""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable
from typing import Protocol

from trainer.devices import Device
from trainer.events import Notice


class Lender(Protocol):
    """Called on the event loop of the jobs."""

    def lends(self, device: Device) -> bool:
        """Whether something serves on the device that makes room for a job."""

    async def borrow(
        self,
        device: Device,
        uid: str,
        tell: Callable[[Notice], Awaitable[object]],
        recall: Callable[[], None],
    ) -> None:
        """Wait until nothing serves on the device any more. A job that has borrowed it already
        has it.

        `tell` is awaited before anybody else notices; `recall` says that the job is to save, and
        to give the device back. Cancelled, nothing is borrowed.
        """

    def give_back(self, device: Device, uid: str, *, publishes: bool = False) -> None:
        """No process of the job uses the device any more; if it `publishes`, its adapter is to be
        served next. Does nothing for a job that has not borrowed it."""

    def outage(self, uid: str) -> Notice | None:
        """What the job's last loan cost those who were served, once it is known; told once."""

    async def returned(self, uid: str) -> None:
        """Wait until what the job gave back serves again, or another job has it."""

    def serving(self) -> contextlib.AbstractAsyncContextManager[None]:
        """Entered when there is something that serves; it stays until the exit."""


class LendsNothing:
    """A lender of devices on which nothing serves, or serves beside."""

    def lends(self, device: Device) -> bool:
        return False

    async def borrow(
        self,
        device: Device,
        uid: str,
        tell: Callable[[Notice], Awaitable[object]],
        recall: Callable[[], None],
    ) -> None:
        return

    def give_back(self, device: Device, uid: str, *, publishes: bool = False) -> None:
        return

    def outage(self, uid: str) -> Notice | None:
        return None

    async def returned(self, uid: str) -> None:
        return

    def serving(self) -> contextlib.AbstractAsyncContextManager[None]:
        return contextlib.nullcontext()
