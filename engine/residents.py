"""What a shard has loaded, as one process knows it, and what this process runs on it.

A request holds its version from before `generate` until after its end. Only what the host
announced as loaded can be held; for anything else the host is asked, and the request waits.
When the host wants a version out, it is no longer handed out here, and the host is told once
the last hold has ended and the core has forgotten the request: so an adapter is never removed
under a request, and vLLM never reads one from disk in the middle of a step (ADR 0007).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from engine.errors import AdapterLoadFailed, ShardUnavailable
from engine.forgetting import until_forgotten
from engine.generation import ServedVersion, VersionKey
from engine.slot_holds import SlotHolds


class Use(NamedTuple):
    """How one process uses a resident version."""

    holds: int
    """Requests that run on it now."""
    last_use_s: float
    """When one last began, on the machine's monotonic clock; 0.0: none did."""


@dataclass(slots=True, eq=False)
class Resident:
    """A loaded version, and how many requests of this process hold it."""

    version: ServedVersion
    holds: int = 0
    last_use_s: float = 0.0
    leave: Callable[[], None] | None = None
    """Set when the host wants it out: called when nothing holds it any more."""


class Residents:
    """The versions that one shard has loaded, for one process."""

    def __init__(
        self,
        ask: Callable[[VersionKey], None],
        in_core: Callable[[int], Awaitable[int]],
        slots: SlotHolds,
        tell_idle: Callable[[], None] = lambda: None,
    ) -> None:
        """`ask` tells the host that a version is wanted; `in_core` counts the requests of this
        process that the core still knows, by `lora_int_id`. `slots` are those of the shard: who
        holds a version enters its slot next. `tell_idle` tells the host, once after each answer of
        `uses`, that a version is idle here which was not."""
        self.slots = slots
        self._ask = ask
        self._in_core = in_core
        self._tell_idle = tell_idle
        self._was_asked = False
        self._residents: dict[VersionKey, Resident] = {}
        self._waiting: dict[VersionKey, list[asyncio.Future[Resident]]] = {}
        self._leaving: set[asyncio.Task[None]] = set()

    async def hold(self, key: VersionKey) -> Resident:
        """Hold a version, and give it back with `release`. Waits while it is loaded.

        Raises AdapterLoadFailed, and ShardUnavailable if the shard dies meanwhile.
        """
        resident = self._residents.get(key)
        if resident is not None:
            _begin(resident)
            return resident
        loaded: asyncio.Future[Resident] = asyncio.get_running_loop().create_future()
        waiting = self._waiting.setdefault(key, [])
        waiting.append(loaded)
        if len(waiting) == 1:
            self._ask(key)
        try:
            return await loaded
        except asyncio.CancelledError:
            # It may have been loaded, and held for us, just before.
            if loaded.done() and not loaded.cancelled() and loaded.exception() is None:
                self.release(loaded.result())
            raise

    def release(self, resident: Resident) -> None:
        """End one hold."""
        resident.holds -= 1
        if resident.holds:
            return
        if resident.leave is not None:
            resident.leave()
        if self._was_asked:
            self._was_asked = False
            self._tell_idle()

    def loaded(self, version: ServedVersion) -> None:
        """Host: the shard has this version now. Whoever waits for it holds it at once."""
        resident = self._residents.get(version.key)
        if resident is None or resident.version != version:
            resident = self._residents[version.key] = Resident(version)
        for future in self._waiting.pop(version.key, ()):
            if not future.done():
                _begin(resident)
                future.set_result(resident)

    def all_loaded(self, versions: Iterable[ServedVersion]) -> None:
        """Host: these are what the shard has."""
        for version in versions:
            self.loaded(version)

    def failed(self, key: VersionKey, reason: str) -> None:
        """Host: the version could not be loaded."""
        for future in self._waiting.pop(key, ()):
            if not future.done():
                future.set_exception(AdapterLoadFailed(key.adapter, key.version, reason))

    def lose(self, shard: str) -> None:
        """Host: this shard is gone. Whoever waits is told with ShardUnavailable."""
        self.slots.lose(shard)
        waiting, self._waiting = self._waiting, {}
        self._residents.clear()
        for future in (future for futures in waiting.values() for future in futures):
            if not future.done():
                future.set_exception(ShardUnavailable(shard))

    def leave(self, key: VersionKey, left: Callable[[], None]) -> None:
        """Host: hand this version out no more, and call `left` when nothing of this process
        runs on it, here or in the core."""
        resident = self._residents.pop(key, None)
        if resident is None:
            left()
            return

        def settle() -> None:
            task = asyncio.create_task(self._settle(resident, left))
            self._leaving.add(task)
            task.add_done_callback(self._leaving.discard)

        resident.leave = settle
        if not resident.holds:
            settle()

    async def _settle(self, resident: Resident, left: Callable[[], None]) -> None:
        await until_forgotten(self._in_core, resident.version.lora_int_id)
        left()

    def uses(self) -> Mapping[VersionKey, Use]:
        """How this process uses what is loaded."""
        self._was_asked = True
        return {
            key: Use(resident.holds, resident.last_use_s)
            for key, resident in self._residents.items()
        }

    async def close(self) -> None:
        """Stop waiting for what leaves."""
        await self.slots.close()
        for task in self._leaving:
            task.cancel()
        await asyncio.gather(*self._leaving, return_exceptions=True)


def _begin(resident: Resident) -> None:
    resident.holds += 1
    resident.last_use_s = time.monotonic()
