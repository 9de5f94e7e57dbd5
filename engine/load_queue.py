"""What one shard is to load, and in which order: that first which requests wait for."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Container
from dataclasses import dataclass, field
from typing import Any

from engine.generation import ServedVersion, VersionKey

AHEAD_WAITS_S = 5.0
"""How long a load that no request waits for lets others pass, at most."""


@dataclass(slots=True, eq=False)
class _Want:
    loaded: asyncio.Future[ServedVersion]
    awaited: bool = False
    """Whether a request waits for it."""
    since_s: float = field(default_factory=time.monotonic)


class LoadQueue:
    """Versions that are wanted and not loaded, the one that is being loaded among them."""

    def __init__(self) -> None:
        self._wants: dict[VersionKey, _Want] = {}
        """In the order of arrival."""

    @property
    def keys(self) -> list[VersionKey]:
        """All of them."""
        return [*self._wants]

    def future(self, key: VersionKey) -> asyncio.Future[ServedVersion] | None:
        """Done when the version is loaded, or could not be; None if it is not wanted."""
        want = self._wants.get(key)
        return None if want is None else want.loaded

    def add(self, key: VersionKey, *, awaited: bool) -> asyncio.Future[ServedVersion]:
        """Want a version, once more or for the first time. What `future` returns."""
        want = self._wants.get(key)
        if want is None:
            loaded: asyncio.Future[ServedVersion] = asyncio.get_running_loop().create_future()
            loaded.add_done_callback(retrieve)
            want = self._wants[key] = _Want(loaded)
        want.awaited |= awaited
        return want.loaded

    def next(self, without: Container[VersionKey]) -> VersionKey | None:
        """The one to be loaded next: not of those `without`, the first that a request waits for,
        else the first. One that nobody waits for takes its turn after AHEAD_WAITS_S."""
        ready = [key for key in self._wants if key not in without]
        return min(ready, key=self._lets_pass, default=None)  # the first of equal ones

    def waited_s(self, key: VersionKey) -> float:
        """How long it has been wanted."""
        return time.monotonic() - self._wants[key].since_s

    def take(self, key: VersionKey) -> asyncio.Future[ServedVersion]:
        """It is wanted no more; whoever takes it tells those who wait."""
        return self._wants.pop(key).loaded

    def fail(self, error: Exception) -> None:
        """None of them is loaded any more."""
        for want in self._wants.values():
            if not want.loaded.done():
                want.loaded.set_exception(error)
        self._wants.clear()

    def cancel(self) -> None:
        """Likewise, and nobody is told why."""
        for want in self._wants.values():
            want.loaded.cancel()

    def _lets_pass(self, key: VersionKey) -> bool:
        return not self._wants[key].awaited and self.waited_s(key) < AHEAD_WAITS_S


def retrieve(future: asyncio.Future[Any]) -> None:
    """Look at an error that nobody may be waiting for."""
    if not future.cancelled():
        future.exception()
