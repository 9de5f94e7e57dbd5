"""The pool: which version answers a request, on which shard.

    name -> version: what the caller asks for, else what the traffic split picks
    version -> shard: the ring's choice for the adapter, by what this process has in flight

Holds the view of adapters that the host pushes, and the ring, which knows the shards that are up
and the adapters that have several. A request is placed once and stays.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import TracebackType

from engine.errors import AdapterNotFound, AdapterNotReady, VersionNotFound
from engine.generation import ServedVersion, VersionKey
from engine.residents import Resident, Residents
from engine.ring import (
    AdapterKey,
    Choice,
    NoShardOpen,
    Plan,
    Reason,
    Ring,
    ShardLent,
    ShardState,
)
from engine.shard import Shard
from engine.slot_holds import Slot
from engine.split import Split


@dataclass(frozen=True, slots=True)
class ServedAdapter:
    """An adapter as workers see it."""

    split: Split
    ready: tuple[int, ...]
    """Versions that may be named, loaded or not."""


@dataclass(frozen=True, slots=True)
class ServedView:
    """What may be asked for. The host changes it adapter by adapter."""

    tenants: dict[str, dict[str, ServedAdapter]] = field(default_factory=dict)

    def show(self, tenant: str, adapter: str, served: ServedAdapter) -> None:
        """Add or replace one adapter. Requests that are placed keep their version."""
        self.tenants.setdefault(tenant, {})[adapter] = served

    def resolve(
        self, tenant: str, adapter: str, version: int | None, session: str
    ) -> VersionKey | None:
        """The version that answers; None is the base model.

        Equal `session`s get equal versions while the split stands. Raises AdapterNotFound,
        VersionNotFound or AdapterNotReady.
        """
        if not adapter:
            return None
        adapters = self.tenants.get(tenant, {})
        served = adapters.get(adapter)
        if served is None:
            raise AdapterNotFound(adapter, adapters)
        if version is None:
            # Not the session alone, or one caller would be in the canary of every adapter.
            version = served.split.pick(f"{tenant}/{adapter}/{session}")
            if version is None:
                raise AdapterNotReady(adapter, served.ready)
        elif version not in served.ready:
            raise VersionNotFound(adapter, version, served.ready)
        return VersionKey(tenant, adapter, version)


class Lease:
    """A place on a shard, a version that stays loaded there, and its slot in the batch, while a
    request runs: an async context manager. The shard counts as busier for as long."""

    __slots__ = ("_resident", "_route", "_slot")

    def __init__(self, route: Route) -> None:
        self._route = route
        self._resident: Resident | None = None
        self._slot: Slot | None = None

    async def __aenter__(self) -> ServedVersion | None:
        """Waits while the version is loaded, and then for its slot; None is the base model, which
        needs neither.

        Raises AdapterLoadFailed, and ShardUnavailable if the shard dies meanwhile.
        """
        route = self._route
        route.in_flight[route.shard.name] += 1  # also while it waits, or all would come here
        if route.key is None:
            return None
        try:
            # In this order: who has a slot waits for nothing that others hold (ADR 0012).
            self._resident = await route.residents.hold(route.key)
            version, slots = self._resident.version, route.residents.slots
            self._slot = slots.enter(route.key, version.lora_int_id)
            if self._slot is None:
                self._slot = await slots.wait(route.key, version.lora_int_id)
        except BaseException:
            self._give_back()
            raise
        return version

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._give_back()

    def _give_back(self) -> None:
        residents = self._route.residents
        self._route.in_flight[self._route.shard.name] -= 1
        if self._slot is not None:
            residents.slots.leave(self._slot)
        if self._resident is not None:
            residents.release(self._resident)


@dataclass(frozen=True, slots=True)
class Route:
    """Where one request goes."""

    shard: Shard
    key: VersionKey | None
    """The adapter version; None is the base model."""
    reason: Reason
    """Why this shard."""
    residents: Residents
    """What the shard has loaded."""
    in_flight: dict[str, int]
    """Requests of this process by shard, which a lease counts."""

    def lease(self) -> Lease:
        """The version, loaded on the shard for as long as the lease lasts."""
        return Lease(self)

    def to(self, key: VersionKey | None) -> Route:
        """Another version on the same shard."""
        return replace(self, key=key)


class ShardPool:
    """The shards of one process, and what they may be asked for."""

    def __init__(
        self,
        shards: Sequence[Shard],
        residents: Mapping[str, Residents],
        view: ServedView,
        names: Iterable[str] = (),
    ) -> None:
        """`residents` by shard name. `names` are those of shards that may join later, too. The
        pool keeps `view`, which its owner changes."""
        known = {*names, *(shard.name for shard in shards)}
        if not known:
            raise ValueError("a pool needs a shard")
        self._view = view
        self._ring = Ring(dict.fromkeys(known, ShardState.DOWN))
        self._in_flight = dict.fromkeys(known, 0)
        self._placed = 0
        self._drained = frozenset[str]()
        self._lent = frozenset[str]()
        self._members: dict[str, tuple[Shard, Residents]] = {}
        for shard in shards:
            self.join(shard, residents[shard.name])

    @property
    def ring(self) -> Ring:
        """The ring as it is now."""
        return self._ring

    @property
    def in_flight(self) -> Mapping[str, int]:
        """Requests of this process that are placed, by shard."""
        return dict(self._in_flight)

    @property
    def placed(self) -> int:
        """Requests that were ever placed; who compares two looks sees whether any came."""
        return self._placed

    @property
    def drained(self) -> frozenset[str]:
        """Shards that take no requests, up or not."""
        return self._drained

    @property
    def lent(self) -> frozenset[str]:
        """Shards that are lent, or about to be."""
        return self._lent

    def join(self, shard: Shard, residents: Residents) -> None:
        """Place requests on this shard too, from now on, unless it is drained. Raises KeyError
        for an unknown name."""
        self._members[shard.name] = shard, residents
        self._note_state(shard.name)

    def drain(self, shards: Collection[str], lent: Collection[str] = ()) -> None:
        """Place nothing on these shards from now on, and again on all others that are up. What is
        placed stays. Those that are `lent` to training are among them, or will be soon."""
        self._drained, self._lent = frozenset(shards), frozenset(lent)
        for name in self._members:
            self._note_state(name)

    def _note_state(self, name: str) -> None:
        state = ShardState.DRAINING if name in self._drained else ShardState.UP
        self._ring = self._ring.with_state(name, state)

    def leave(self, shard: str) -> None:
        """Place nothing on this shard any more; what is placed there stays."""
        self._ring = self._ring.with_state(shard, ShardState.DOWN)
        self._members.pop(shard, None)

    def follow(self, plan: Plan) -> None:
        """Spread hot adapters over this many replicas, from now on."""
        self._ring = self._ring.with_plan(plan)

    @property
    def is_open(self) -> bool:
        """Whether any shard takes requests."""
        return ShardState.UP in self._ring.states.values()

    @property
    def stays_open(self) -> bool:
        """Whether any does that is not about to be lent."""
        states = self._ring.states
        return any(states[name] is ShardState.UP for name in states if name not in self._lent)

    def resolve(
        self, tenant: str, adapter: str, version: int | None, session: str
    ) -> VersionKey | None:
        """The version that answers, as `ServedView.resolve` says; None is the base model."""
        return self._view.resolve(tenant, adapter, version, session)

    def route(self, tenant: str, adapter: str, version: int | None, session: str) -> Route:
        """Place one request. Raises AdapterNotFound, VersionNotFound, AdapterNotReady, and
        NoShardOpen."""
        return self.route_to(self.resolve(tenant, adapter, version, session))

    def route_to(self, key: VersionKey | None, without: Collection[str] = ()) -> Route:
        """Place a request of a version that is known, READY or not; None is the base model.

        On none of the shards `without`, which were tried. Raises NoShardOpen.
        """
        choice = self.choose(key, without)
        self._placed += 1
        return self._at(choice.shard, key, choice.reason)

    def choose(self, key: VersionKey | None, without: Collection[str] = ()) -> Choice:
        """Where a request would be placed now, and by what. Raises as `route_to`."""
        adapter = None if key is None else AdapterKey(key.tenant, key.adapter)
        try:
            return self._ring.choose(adapter, self._in_flight, without)
        except NoShardOpen as error:
            raise self._none_open(error.shard) from None

    def _none_open(self, first: str) -> NoShardOpen:
        """Why no shard is open, `first` the first one. Lent, if no other one is about to come."""
        states = self._ring.states
        dead = [name for name in states if states[name] is ShardState.DOWN]
        if self._lent and self._lent.issuperset(dead):
            return ShardLent(first if first in self._lent else min(self._lent))
        return NoShardOpen(first)

    def homes(self, key: VersionKey) -> list[Route]:
        """The shards that should have the version loaded, the first to be asked first.

        Raises NoShardOpen.
        """
        adapter = AdapterKey(key.tenant, key.adapter)
        names = self._ring.replicas(adapter)
        if not names:
            raise self._none_open(self._ring.ranked(adapter)[0])
        return [self._at(name, key, Reason.PLANNED) for name in names]

    def _at(self, name: str, key: VersionKey | None, reason: Reason) -> Route:
        shard, residents = self._members[name]
        return Route(shard, key, reason, residents, self._in_flight)
