"""What tenants had of the devices lately: seconds, of which half are forgotten in HALF_LIFE_S."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from store.job_records import JobRecord

HALF_LIFE_S = 6 * 3600.0
"""Long enough that a run of some hours counts, and short enough that the day forgets the night. A
device in use without an end comes to HALF_LIFE_S / ln 2, 8.7 hours."""


@dataclass(frozen=True, slots=True)
class DeviceUse:
    """What jobs of one tenant and one priority had of the devices."""

    tenant: str
    priority: int
    used_s: float = 0.0
    """What is not forgotten at `time_ns`; of jobs that hold a device, nothing yet."""
    time_ns: int = 0
    """Since the epoch, as all times."""
    grant_time_ns: int = 0
    """When one of them was last given a device; 0: never."""

    def used_at(self, now_ns: int) -> float:
        """Seconds that are not forgotten by then."""
        passed_s = max(0, now_ns - self.time_ns) / 1e9  # clocks are set back
        return self.used_s * _left(passed_s)

    def granted(self, now_ns: int) -> DeviceUse:
        """Once one of them was given a device."""
        return replace(self, grant_time_ns=max(self.grant_time_ns, now_ns))

    def returned(self, since_ns: int, now_ns: int) -> DeviceUse:
        """Once one of them has given back a device that it had since then."""
        used_s = self.used_at(now_ns) + held_s(since_ns, now_ns)
        return replace(self, used_s=used_s, time_ns=now_ns)


def held_s(since_ns: int, now_ns: int) -> float:
    """Seconds of a device that is held since then, less what of them is forgotten already."""
    return HALF_LIFE_S / math.log(2) * (1 - _left(max(0, now_ns - since_ns) / 1e9))


def use_after(
    uses: Mapping[tuple[str, int], DeviceUse], before: JobRecord, after: JobRecord, now_ns: int
) -> DeviceUse | None:
    """What a change of a job makes of its tenant's use, by tenant and priority; None: nothing."""
    key = before.tenant, before.priority
    use = uses.get(key, DeviceUse(*key))
    if before.device_time_ns is None and after.device_time_ns is not None:
        return use.granted(after.device_time_ns)
    if before.device_time_ns is not None and after.device_time_ns is None:
        return use.returned(before.device_time_ns, now_ns)
    return None


def _left(passed_s: float) -> float:
    """The part that is not forgotten after so long."""
    return float(0.5 ** (passed_s / HALF_LIFE_S))
