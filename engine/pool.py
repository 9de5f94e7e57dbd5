"""The pool: which version answers a request, on which shard.

Holds the view of adapters that the host pushes, and resolves a name in it: the version that the
caller asks for, else the one that the traffic split picks. With several shards the ring will
choose here; a request is placed once and stays.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType

from engine.errors import AdapterNotFound, AdapterNotReady, VersionNotFound
from engine.generation import ServedVersion, VersionKey
from engine.residents import Resident, Residents
from engine.shard import Shard
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
    """A version that stays loaded while a request runs on it: an async context manager."""

    __slots__ = ("_key", "_resident", "_residents")

    def __init__(self, residents: Residents, key: VersionKey | None) -> None:
        self._residents = residents
        self._key = key
        self._resident: Resident | None = None

    async def __aenter__(self) -> ServedVersion | None:
        """Waits while the version is loaded; None is the base model. Raises AdapterLoadFailed."""
        if self._key is None:
            return None
        self._resident = await self._residents.hold(self._key)
        return self._resident.version

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._resident is not None:
            self._residents.release(self._resident)


@dataclass(frozen=True, slots=True)
class Route:
    """Where one request goes."""

    shard: Shard
    key: VersionKey | None
    """The adapter version; None is the base model."""
    _residents: Residents

    def lease(self) -> Lease:
        """The version, loaded on the shard for as long as the lease lasts."""
        return Lease(self._residents, self.key)


class ShardPool:
    """The shards of one process, and what they may be asked for."""

    def __init__(
        self, shards: Sequence[Shard], residents: Mapping[str, Residents], view: ServedView
    ) -> None:
        """`residents` by shard name. The pool keeps `view`, which its owner changes."""
        if not shards:
            raise ValueError("a pool needs a shard")
        self._shards = shards
        self._residents = residents
        self._view = view

    def route(self, tenant: str, adapter: str, version: int | None, session: str) -> Route:
        """Place one request. Raises AdapterNotFound, VersionNotFound or AdapterNotReady."""
        return self.route_to(self._view.resolve(tenant, adapter, version, session))

    def route_to(self, key: VersionKey | None) -> Route:
        """Place a request of a version that is known, READY or not; None is the base model."""
        shard = self._shards[0]
        return Route(shard, key, self._residents[shard.name])
