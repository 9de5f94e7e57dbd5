"""Slots that are shared out, and all processes around them, which do nothing by themselves."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Mapping
from typing import Any

from engine.generation import VersionKey
from engine.residents import Use
from engine.slots import MIN_TENURE_S, AdapterSlots

A, B, C, D, E, F = (VersionKey("acme", name, 1) for name in "abcdef")
SHARD = "shard-0"
ONE, OTHER = 101, 102
"""Processes."""


class Holders:
    """All processes, which do nothing by themselves."""

    def __init__(self) -> None:
        self.granted_to: list[VersionKey] = []
        self.withdrawn_from: list[VersionKey] = []
        self.recalled: list[VersionKey] = []
        self.returned: dict[VersionKey, asyncio.Event] = {}
        self.busy: dict[VersionKey, int] = {}
        """How many requests run, by version."""
        self.last_use_s: dict[VersionKey, float] = {}
        self.loaded: set[VersionKey] = {A, B, C, D, E, F}
        self.surveys = 0

    def granted(self, shard: str, key: VersionKey) -> None:
        assert shard == SHARD
        self.granted_to.append(key)

    def withdrawn(self, shard: str, key: VersionKey) -> None:
        self.withdrawn_from.append(key)

    def recall(self, shard: str, key: VersionKey) -> Awaitable[Any]:
        self.recalled.append(key)
        event = self.returned[key] = asyncio.Event()
        return event.wait()

    async def uses(self, shard: str) -> Mapping[VersionKey, Use]:
        self.surveys += 1
        await asyncio.sleep(0)
        return {
            key: Use(self.busy.get(key, 0), self.last_use_s.get(key, 0.0)) for key in self.loaded
        }


class Stage:
    """Slots that are shared out, and everybody around them."""

    def __init__(self, capacity: int) -> None:
        self.holders = Holders()
        self.counts: list[int] = []
        self.slots = AdapterSlots(
            SHARD, capacity, self.holders, lambda shard, count: self.counts.append(count)
        )

    def want(self, *keys: VersionKey, process: int = ONE) -> None:
        """Requests of these versions wait in one process, in this order."""
        for key in keys:
            self.slots.note_waiting(key, process, True)

    def give_up(self, key: VersionKey, process: int = ONE) -> None:
        self.slots.note_waiting(key, process, False)

    def become_busy(self, *keys: VersionKey, requests: int = 8) -> None:
        self.holders.busy.update(dict.fromkeys(keys, requests))

    async def give_back(self, key: VersionKey) -> None:
        """Nothing runs in a recalled slot any more."""
        self.holders.busy.pop(key, None)
        self.holders.returned[key].set()
        await soon()


async def soon() -> None:
    """Let all that can run, run."""
    await asyncio.sleep(0.001)


async def grown_old() -> None:
    """All slots are old enough to be recalled."""
    await asyncio.sleep(2 * MIN_TENURE_S)
