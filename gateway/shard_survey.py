"""How the shards are at one moment: their keepers, cores, drains, requests and versions."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from engine.errors import ShardUnavailable
from engine.generation import Load, VersionKey
from engine.residency import Place
from engine.residents import Use
from engine.slots import AdapterSlots
from gateway.drains import Drain, Drains
from gateway.keeper import Death
from gateway.keeper_state import KeeperState
from gateway.processes import Processes
from gateway.shards import Shards

CORE_ANSWER_S = 1.0
"""How long a core may take to tell what it runs."""
UNUSED = Use(0, 0.0)


class Kept(Protocol):
    """A shard as its keeper knows it; see ShardKeeper for the fields."""

    name: str
    state: KeeperState
    since_s: float
    last_death: Death | None
    restarts: int
    next_start_s: float | None

    @property
    def slots_left(self) -> int:
        """Client slots of the core that were never taken."""


@dataclass(frozen=True, slots=True)
class Surveyed:
    """One shard at one moment."""

    kept: Kept
    drain: Drain | None
    in_flight: int
    """Requests that all processes have placed there."""
    load: Load | None
    """None: the core does not tell."""
    capacity: int
    """Versions that may be loaded."""
    places_left: int
    places: Mapping[VersionKey, Place]
    uses: Mapping[VersionKey, Use]
    slots: AdapterSlots | None
    """None: no core runs."""

    def has_slot_for(self, key: VersionKey | None) -> bool:
        """Whether a request would be in the next batch, though other versions' requests run."""
        if self.slots is None or self.kept.state is not KeeperState.UP:
            return False
        return key is None or self.slots.may_enter(key, self.in_use)

    def use(self, key: VersionKey) -> Use:
        """How a version is used there."""
        return self.uses.get(key, UNUSED)

    @property
    def in_use(self) -> set[VersionKey]:
        """Versions that requests run on now."""
        return {key for key, use in self.uses.items() if use.holds}


class ShardSurvey:
    """Asks all who know of the shards."""

    def __init__(
        self,
        keepers: Sequence[Kept],
        shards: Shards,
        drains: Drains,
        processes: Processes,
        capacity: int,
    ) -> None:
        """`capacity` is how many versions one shard may have loaded."""
        self._keepers = {keeper.name: keeper for keeper in keepers}
        self._shards = shards
        self._drains = drains
        self._processes = processes
        self._capacity = capacity

    async def all(self) -> dict[str, Surveyed]:
        """Every shard by its name, in the order of their numbers."""
        in_flight = await self._in_flight()
        found = await asyncio.gather(*(self._one(name, in_flight) for name in self._keepers))
        return dict(zip(self._keepers, found, strict=True))

    async def one(self, name: str) -> Surveyed:
        """One shard, which is known."""
        return await self._one(name, await self._in_flight())

    async def _in_flight(self) -> dict[str, int]:
        workers = [answer.in_flight for answer in await self._processes.placed()]
        own = self._shards.pool.in_flight
        return {name: sum(counts[name] for counts in (own, *workers)) for name in own}

    async def _one(self, name: str, in_flight: Mapping[str, int]) -> Surveyed:
        load, uses = await asyncio.gather(self._load(name), self._processes.uses(name))
        residency = self._shards.residencies.get(name)
        return Surveyed(
            self._keepers[name],
            self._drains.drain_of(name),
            in_flight[name],
            load,
            self._capacity,
            0 if residency is None else residency.places_left,
            {} if residency is None else {p.version.key: p for p in residency.places()},
            uses,
            self._shards.slots.get(name),
        )

    async def _load(self, name: str) -> Load | None:
        core = self._shards.core(name)
        if core is None:
            return None
        try:
            async with asyncio.timeout(CORE_ANSWER_S):
                return await core.core_load()
        except (ShardUnavailable, TimeoutError):
            return None
