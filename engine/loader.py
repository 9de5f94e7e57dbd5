"""What the residency of a shard asks of others: to load, to find versions, to let go of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from engine.adapter_loader import LoadTimes
from engine.generation import ServedVersion, VersionKey
from engine.residents import Use


class Loader(Protocol):
    """The shard, for loading."""

    @property
    def name(self) -> str:
        """Stable name, for example `shard-0`."""

    async def load(self, version: ServedVersion) -> LoadTimes:
        """Load it, and tell how long that took. Raises GenerationFailed or ShardUnavailable."""

    async def unload(self, version: ServedVersion) -> None:
        """Remove it, also if it is not there; nothing runs on it. Raises ShardUnavailable."""


class Versions(Protocol):
    """Where versions to be loaded come from."""

    async def find(self, key: VersionKey) -> ServedVersion:
        """The version with its verified files. Raises EngineError if it may not be loaded."""

    async def with_new_id(self, version: ServedVersion) -> ServedVersion:
        """The same under an id that no engine has seen."""


class Holders(Protocol):
    """All processes that send requests to the shard."""

    def loaded(self, shard: str, version: ServedVersion) -> None:
        """Tell all that it is resident."""

    def failed(self, shard: str, key: VersionKey, reason: str) -> None:
        """Tell all that it could not be loaded."""

    async def leave(self, shard: str, key: VersionKey) -> None:
        """Tell all to hand it out no more; returns when nothing runs on it anywhere."""

    async def uses(self, shard: str) -> Mapping[VersionKey, Use]:
        """How it is used, over all."""
