"""Who trains next: one job a device, the oldest first."""

from __future__ import annotations

import asyncio
import bisect
from collections.abc import Sequence
from dataclasses import dataclass, field

from trainer.devices import Device
from trainer.errors import TrainingUnavailable


@dataclass(order=True, slots=True)
class _Waiter:
    since_ns: int
    uid: str
    device: asyncio.Future[Device] = field(compare=False)


class DeviceQueue:
    """The devices of one gateway, and the jobs that wait for one."""

    def __init__(self, devices: Sequence[Device]) -> None:
        self._free = list(devices)
        self._holders: dict[Device, set[str]] = {}
        """By uid. More than one where runs that went on without us have the same device."""
        self._waiting: list[_Waiter] = []

    async def take(self, uid: str, since_ns: int) -> Device:
        """A device for this job, once it is free and no job since earlier waits for it.

        Raises TrainingUnavailable where there is none that could become free.
        """
        if not self._free and not self._holders:
            raise TrainingUnavailable(
                "this gateway has no device to train on any more: its operator names one with "
                "--training-devices; create the job again then"
            )
        waiter = _Waiter(since_ns, uid, asyncio.get_running_loop().create_future())
        bisect.insort(self._waiting, waiter)
        self._hand_out()
        try:
            return await waiter.device
        except asyncio.CancelledError:
            if waiter in self._waiting:
                self._waiting.remove(waiter)
            elif not waiter.device.cancelled():
                self.give_back(waiter.device.result(), uid)
            raise

    def hold(self, name: str, uid: str) -> Device:
        """The device of a run that went on without us; it need not be one of ours any more.
        Held already, it stays so."""
        device = Device(name)
        if device in self._free:
            self._free.remove(device)
            self._holders[device] = {uid}
        elif device in self._holders:
            self._holders[device].add(uid)
        return device

    def give_back(self, device: Device, uid: str) -> None:
        """Let the next job have it, unless another holds it too."""
        holders = self._holders.get(device, set())
        if uid in holders:
            holders.remove(uid)
            if not holders:
                del self._holders[device]
                self._free.append(device)
                self._hand_out()

    def position(self, uid: str) -> int:
        """From 1 for the job that is next; 0 for one that does not wait."""
        return next((at for at, waiter in enumerate(self._waiting, 1) if waiter.uid == uid), 0)

    def _hand_out(self) -> None:
        while self._free and self._waiting:
            waiter = self._waiting.pop(0)
            if waiter.device.done():  # cancelled, and not told so yet
                continue
            device = self._free.pop(0)
            self._holders[device] = {waiter.uid}
            waiter.device.set_result(device)
