"""What each tenant has of the devices: what it had lately, and what it holds now."""

from __future__ import annotations

from collections.abc import Iterable

from store.device_use import DeviceUse, held_s
from trainer.claim import Claim

ADVANCE_S = 600.0
"""Of a device that was just given, as nobody knows for how long: what it counts at the least while
it is held. So devices that are free at once go to one tenant each."""


class DeviceShares:
    """Counts as the store does, and what is held beside it."""

    def __init__(self) -> None:
        self._uses: dict[tuple[str, int], DeviceUse] = {}
        self._held: dict[str, tuple[Claim, int]] = {}
        """By uid, with the time since when."""

    def seed(self, uses: Iterable[DeviceUse]) -> None:
        """Begin with what the store knows, before anything is held."""
        self._uses = {(use.tenant, use.priority): use for use in uses}

    def begin(self, claim: Claim, since_ns: int) -> None:
        """A job has a device since then."""
        self._held[claim.uid] = claim, since_ns
        key = claim.tenant, claim.priority
        self._uses[key] = self._use(key).granted(since_ns)

    def end(self, uid: str, now_ns: int) -> None:
        """A job has given back its device."""
        claim, since_ns = self._held.pop(uid)
        key = claim.tenant, claim.priority
        self._uses[key] = self._use(key).returned(since_ns, now_ns)

    def used_s(self, tenant: str, now_ns: int) -> float:
        """Seconds that a tenant had, and those of what it holds; later ones count more."""
        had_s = sum(use.used_at(now_ns) for use in self._uses.values() if use.tenant == tenant)
        return had_s + sum(
            max(ADVANCE_S, held_s(since_ns, now_ns))
            for claim, since_ns in self._held.values()
            if claim.tenant == tenant
        )

    def granted_ns(self, priority: int) -> int:
        """When a job of that priority was last given a device; 0: never."""
        return max(
            (use.grant_time_ns for use in self._uses.values() if use.priority == priority),
            default=0,
        )

    def _use(self, key: tuple[str, int]) -> DeviceUse:
        return self._uses.get(key, DeviceUse(*key))
