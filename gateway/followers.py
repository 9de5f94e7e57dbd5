"""All who use a shard, and follow its fate."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any, Protocol

from engine.core import ClientSlot
from engine.core_death import CoreDeath
from engine.shard import VllmShard


class Followers(Protocol):
    """Told by the shard's keeper."""

    def lose(self, shard: str, death: CoreDeath) -> None:
        """The core is dead: nobody uses it any more, and whoever waits for it is told."""

    async def prepare(self, shard: VllmShard) -> None:
        """Load what belongs on a new core, which nobody uses yet. Raises ShardUnavailable."""

    def admit(self, shard: str, take_slot: Callable[[], ClientSlot]) -> Coroutine[Any, Any, None]:
        """Have all use it, before the first wait; then wait until they do. The slots are for
        workers."""
