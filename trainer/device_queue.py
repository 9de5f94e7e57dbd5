"""Who trains next: one job a device, in the order of `trainer/fair_order.py`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from store.device_use import DeviceUse
from trainer.claim import Claim
from trainer.device_shares import DeviceShares
from trainer.devices import Device
from trainer.errors import TrainingUnavailable
from trainer.fair_order import in_order

FRESH_NS = 1_000_000_000
"""For so long places are told again, unless a job comes or goes: a list asks for many."""


def unobserved(priority: int, wait_s: float) -> None:
    """Tell nobody how long a job waited."""


@dataclass(eq=False, slots=True)
class _Waiter:
    claim: Claim
    device: asyncio.Future[Device]


class DeviceQueue:
    """The devices of one gateway, and the jobs that wait for one."""

    def __init__(
        self,
        devices: Sequence[Device],
        *,
        clock_ns: Callable[[], int] = time.time_ns,
        observe_wait: Callable[[int, float], None] = unobserved,
    ) -> None:
        """`clock_ns` tells the time, in nanoseconds since the epoch; `observe_wait` hears of each
        job that is given a device its priority, and how many seconds it was queued."""
        self._free = list(devices)
        self._holders: dict[Device, set[str]] = {}
        """By uid. More than one where runs that went on without us have the same device."""
        self._waiting: dict[str, _Waiter] = {}
        """By uid."""
        self._shares = DeviceShares()
        self._clock_ns = clock_ns
        self._observe_wait = observe_wait
        self._places: tuple[int, Mapping[str, int]] | None = None
        """Of those that wait, by uid, and when they were told."""

    def seed(self, uses: Iterable[DeviceUse]) -> None:
        """Begin with what tenants had of the devices before, as the store has it."""
        self._shares.seed(uses)

    async def take(self, claim: Claim) -> Device:
        """A device for this job, once one is free and no other job comes first.

        Raises TrainingUnavailable where there is none that could become free.
        """
        if not self._free and not self._holders:
            raise TrainingUnavailable(
                "this gateway has no device to train on any more: its operator names one with "
                "--training-devices; create the job again then"
            )
        waiter = _Waiter(claim, asyncio.get_running_loop().create_future())
        self._waiting[claim.uid] = waiter
        self._hand_out()
        try:
            return await waiter.device
        except asyncio.CancelledError:
            if self._waiting.get(claim.uid) is waiter:
                del self._waiting[claim.uid]
                self._places = None
            elif not waiter.device.cancelled():
                self.give_back(waiter.device.result(), claim.uid)
            raise

    def hold(self, name: str, claim: Claim, since_ns: int | None = None) -> Device:
        """The device of a run that went on without us, which it has since then (None: now); it
        need not be one of ours any more. Held already, it stays so."""
        device = Device(name)
        if device in self._free:
            self._free.remove(device)
            self._holders[device] = set()
        if claim.uid not in self._holders.get(device, {claim.uid}):
            self._begin(device, claim, self._clock_ns() if since_ns is None else since_ns)
        return device

    def give_back(self, device: Device, uid: str) -> None:
        """Let the next job have it, unless another holds it too."""
        holders = self._holders.get(device, set())
        if uid in holders:
            holders.remove(uid)
            self._shares.end(uid, self._clock_ns())
            if not holders:
                del self._holders[device]
                self._free.append(device)
                self._hand_out()

    def position(self, uid: str) -> int:
        """From 1 for the job that is next; 0 for one that does not wait."""
        now_ns = self._clock_ns()
        if self._places is None or not 0 <= now_ns - self._places[0] < FRESH_NS:
            order = in_order(self._claims(), self._shares, now_ns)
            self._places = now_ns, {claim.uid: at for at, claim in enumerate(order, 1)}
        return self._places[1].get(uid, 0)

    def position_of_new(self, tenant: str, priority: int) -> int:
        """What `position` would tell of a job that came now; 0: a device is free for it."""
        if self._free:
            return 0
        now_ns = self._clock_ns()
        new = Claim("", tenant, priority, now_ns, now_ns)
        order = in_order([*self._claims(), new], self._shares, now_ns)
        return next(at for at, claim in enumerate(order, 1) if claim is new)

    def _claims(self) -> list[Claim]:
        # One that was cancelled, and not told so yet, does not wait any more.
        return [each.claim for each in self._waiting.values() if not each.device.done()]

    def _hand_out(self) -> None:
        self._places = None
        while self._free:
            now_ns = self._clock_ns()
            first = next(in_order(self._claims(), self._shares, now_ns), None)
            if first is None:
                return
            device = self._free.pop(0)
            self._holders[device] = set()
            self._begin(device, first, now_ns)
            self._waiting.pop(first.uid).device.set_result(device)
            self._observe_wait(first.priority, max(0, now_ns - first.queue_time_ns) / 1e9)

    def _begin(self, device: Device, claim: Claim, since_ns: int) -> None:
        self._holders[device].add(claim.uid)
        self._shares.begin(claim, since_ns)
        self._places = None
