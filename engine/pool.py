"""The pool: which shard answers a request, with which version of the adapter.

Holds the view of served adapters that the host pushes, and resolves a name in it. With
several shards the ring will choose here; a request is placed once and stays.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field

from engine.errors import AdapterNotFound, VersionNotFound
from engine.generation import GenerationRequest, Output, ServedVersion
from engine.rendering import RenderedPrompt
from engine.shard import Shard


@dataclass(frozen=True, slots=True)
class ServedAdapter:
    """An adapter as workers see it: its loaded versions, and the one that answers by default."""

    default_version: int
    versions: Mapping[int, ServedVersion]


@dataclass(frozen=True, slots=True)
class ServedView:
    """What is served, as one immutable picture; the host replaces it as a whole."""

    adapters: Mapping[str, ServedAdapter] = field(default_factory=dict)

    def resolve(self, adapter: str, version: int | None) -> ServedVersion | None:
        """The version that answers; None is the base model.

        Raises AdapterNotFound or VersionNotFound, naming what is served.
        """
        if not adapter:
            return None
        served = self.adapters.get(adapter)
        if served is None:
            raise AdapterNotFound(adapter, list(self.adapters))
        number = served.default_version if version is None else version
        if number not in served.versions:
            raise VersionNotFound(adapter, number, list(served.versions))
        return served.versions[number]


@dataclass(frozen=True, slots=True)
class Route:
    """Where one request goes."""

    shard: Shard
    version: ServedVersion | None
    """The adapter version; None is the base model."""

    def generate(
        self, request: GenerationRequest, prompt: RenderedPrompt
    ) -> AsyncGenerator[Output, None]:
        """Outputs of the request, from its shard. See `Shard.generate`."""
        return self.shard.generate(request, prompt, self.version)


class ShardPool:
    """The shards of one process, and the adapters that they serve."""

    def __init__(self, shards: Sequence[Shard]) -> None:
        if not shards:
            raise ValueError("a pool needs a shard")
        self._shards = shards
        self._view = ServedView()

    def show(self, view: ServedView) -> None:
        """Replace the view of served adapters. Requests that are routed keep their version."""
        self._view = view

    def route(self, adapter: str, version: int | None) -> Route:
        """Place one request. Raises AdapterNotFound or VersionNotFound."""
        return Route(self._shards[0], self._view.resolve(adapter, version))
