"""In which order jobs are given devices. Pure.

A higher priority goes first. Among jobs of one priority, those of the tenant that had least of the
devices lately; of that tenant, the oldest.

No job waits for ever, whatever comes after it:

- Waiting counts, too: a priority of which a job waits, and none was given a device for AGEING_S,
  is as good as the next higher one, and so on, until a job of it is given one. So it is its turn
  after AGEING_S * (MAX_PRIORITY - priority) at the latest, but for one job of each other priority
  that has waited as long.
- What a tenant had is forgotten by half in HALF_LIFE_S (`store/device_use.py`), and what others
  are given meanwhile counts. So of n tenants none waits longer than HALF_LIFE_S * log2(n) for the
  next turn of its priority, but for the jobs that run.
- What is of one tenant and one priority goes by age, which is told from when a job was made: one
  that was lost or paused is not behind all others.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator

from trainer.claim import Claim
from trainer.device_shares import ADVANCE_S, DeviceShares

AGEING_S = 1800.0
"""That a priority has to wait to be as good as the next higher one."""


def in_order(waiting: Iterable[Claim], shares: DeviceShares, now_ns: int) -> Iterator[Claim]:
    """Those that wait, as they would be given devices if all were free one after the other now.

    How long jobs hold devices is not known, so each counts ADVANCE_S for what comes after it.
    """
    classes: dict[int, dict[str, deque[Claim]]] = {}
    since_ns: dict[int, int] = {}
    """Since when the jobs of a priority wait, and none was given a device."""
    for claim in sorted(waiting, key=_age):
        tenants = classes.setdefault(claim.priority, {})
        tenants.setdefault(claim.tenant, deque()).append(claim)
        queued_ns = min(claim.queue_time_ns, since_ns.get(claim.priority, claim.queue_time_ns))
        since_ns[claim.priority] = queued_ns
    for priority, queued_ns in since_ns.items():
        since_ns[priority] = max(queued_ns, shares.granted_ns(priority))
    used_s = {
        tenant: shares.used_s(tenant, now_ns) for tenants in classes.values() for tenant in tenants
    }
    while classes:
        priority = max(classes, key=lambda each: _rank(each, now_ns - since_ns[each]))
        tenants = classes[priority]
        tenant = min(tenants, key=lambda each: (used_s[each], _age(tenants[each][0])))
        yield tenants[tenant].popleft()
        used_s[tenant] += ADVANCE_S
        since_ns[priority] = now_ns
        if not tenants[tenant]:
            del tenants[tenant]
        if not tenants:
            del classes[priority]


def _age(claim: Claim) -> tuple[int, str]:
    """The older one is less."""
    return claim.create_time_ns, claim.uid


def _rank(priority: int, waited_ns: int) -> tuple[float, int]:
    """What a priority counts after it waited so long; of equals, the one that waited longer."""
    waited_ns = max(0, waited_ns)  # clocks are set back
    return priority * AGEING_S + waited_ns / 1e9, waited_ns
