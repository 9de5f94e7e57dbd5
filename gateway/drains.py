"""Shards that are taken out of the route, and put back: for an operator, to be renewed, or lent.

    drain:  what has traffic is loaded where it will go -> the route moves -> what runs there ends
    resume: what belongs there is loaded there -> the route moves back

That a shard is drained is what somebody wants, and no state of its core: it stays so when the core
dies and another one comes. Owned by the control plane (ADR 0011, ADR 0016).
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import logging
import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from engine.errors import EngineError, ShardUnavailable
from engine.generation import VersionKey
from engine.residency import Residency
from engine.residents import Use
from engine.ring import AdapterKey, Ring, ShardState
from gateway import metrics
from gateway.exceptions import LastOpenShard, ShardUnknown
from gateway.processes import Processes
from gateway.shards import Shards

logger = logging.getLogger(__name__)

LATELY_S = 900.0
"""Versions without traffic that were used within this time are moved too: somebody names them."""
QUIET_POLL_S = 0.2
"""How often is looked whether something still runs on a shard."""
CORE_ANSWER_S = 2.0
"""How long a core may take to tell what it runs; a step takes less."""

_UNUSED = Use(0, 0.0)


class Wish(enum.Enum):
    """Whose wish it is that a shard takes no requests."""

    OPERATOR = "operator"
    RENEWAL = "renewal"
    """To replace its core."""
    LENDING = "lending"
    """To lend its device."""


@dataclass(slots=True)
class Drain:
    """One shard that is to take no requests."""

    begin_s: float
    """When it was asked for, in seconds since the epoch."""
    wishes: set[Wish] = field(default_factory=set)
    """It stays drained until all of them are taken back."""
    moved: bool = False
    """Whether the route has moved."""
    to_move: int = 0
    """Versions that are to be loaded elsewhere first, as far as it is known."""
    done: int = 0
    """Those of them that are loaded, or could not be."""


class Move(NamedTuple):
    """A version that was loaded on another shard, for a drain."""

    key: VersionKey
    shard: str
    duration_s: float
    error: str
    """Why it could not be loaded; empty: it is."""


class _Missing(NamedTuple):
    """A version that is to be loaded on a shard."""

    key: VersionKey
    residency: Residency
    """Of that shard."""
    last_use_s: float
    """On the monotonic clock; inf: it is in use."""


class Drains:
    """Drains and resumes, one at a time."""

    def __init__(self, shards: Shards, processes: Processes) -> None:
        self._shards = shards
        self._processes = processes
        self._drains: dict[str, Drain] = {}
        for name in shards.pool.ring.shards:
            metrics.shard_drained.labels(name).set(0)

    def drain_of(self, shard: str) -> Drain | None:
        """The drain of a shard; None if it is not drained, nor about to be."""
        return self._drains.get(shard)

    def check(self, shard: str) -> None:
        """Raise ShardUnknown if there is no shard of that name."""
        if shard not in (names := self._shards.pool.ring.shards):
            raise ShardUnknown(shard, names)

    def is_last(self, shard: str) -> bool:
        """Whether nobody would answer without this one, now or for good."""
        states = self._shards.pool.ring.states
        others = [name for name in states if name != shard]
        if states[shard] is ShardState.UP and not any(
            states[name] is ShardState.UP for name in others
        ):
            return True
        return all(name in self._drains for name in others)

    async def drain(
        self,
        shard: str,
        *,
        wish: Wish = Wish.OPERATOR,
        even_last: bool = False,
        notice_s: float = 0.0,
    ) -> list[Move]:
        """Take a shard out of the route; returns when that has moved, with what was loaded first.

        The last one that is open is refused, or taken if `even_last`: then health has said for
        `notice_s` that it will be. Cancelled before the route moves, it leaves all as it was.
        Raises ShardUnknown and LastOpenShard.
        """
        self.check(shard)
        async with self._shards.routing:
            drain = self._drains.get(shard)
            if drain is not None:
                drain.wishes.add(wish)
                await self._announce()
                return []
            self._refuse_last(shard, even_last)
            drain = Drain(time.time(), {wish})
            self._drains[shard] = drain
            try:
                if wish is Wish.LENDING:
                    await self._announce()
                    await asyncio.sleep(notice_s if self.is_last(shard) else 0.0)
                moves = await self._move(shard, drain)
                self._refuse_last(shard, even_last)  # the others may have died meanwhile
            except BaseException:
                del self._drains[shard]
                if wish is Wish.LENDING:
                    await self._announce()
                raise
            # No step since the last look at what is to be moved.
            drain.moved = True
            await self._announce()
        logger.info("%s is drained: %d loads elsewhere came first", shard, len(moves))
        return moves

    async def resume(self, shard: str, *, wish: Wish = Wish.OPERATOR) -> None:
        """Put a shard back into the route, warm. Cancelled before, it stays drained. Raises
        ShardUnknown."""
        self.check(shard)
        async with self._shards.routing:
            drain = self._drains.get(shard)
            if drain is None:
                return
            if wish not in drain.wishes:
                return
            if len(drain.wishes) > 1:  # another one still wants it
                drain.wishes.remove(wish)
                await self._announce()
                return
            if shard in self._shards.residencies:
                with contextlib.suppress(ShardUnavailable):  # it dies, and is warm when it is back
                    await self._shards.warm(shard, await self._used_lately())
            del self._drains[shard]
            await self._announce()
        logger.info("%s takes requests again", shard)

    async def until_idle(self, shard: str) -> None:
        """Wait until nothing runs on the shard."""
        while not await self.is_idle(shard):  # noqa: ASYNC110  # workers and core, asked each time
            await asyncio.sleep(QUIET_POLL_S)

    async def is_idle(self, shard: str) -> bool:
        """Whether nothing runs there, for all that answer: workers, host and core."""
        placed = [answer.in_flight for answer in await self._processes.placed()]
        if any(counts[shard] for counts in (*placed, self._shards.pool.in_flight)):
            return False
        core = self._shards.core(shard)
        if core is None:
            return True
        try:
            async with asyncio.timeout(CORE_ANSWER_S):
                load = await core.core_load()
        except ShardUnavailable:  # nothing runs on a core that is dead
            return True
        except TimeoutError:
            return False
        return not load.running + load.waiting

    def _refuse_last(self, shard: str, even_last: bool) -> None:
        """Raise LastOpenShard if nobody would answer without this one, unless that is meant."""
        if not even_last and self.is_last(shard):
            raise LastOpenShard(shard)

    async def _announce(self) -> None:
        names = frozenset(name for name, drain in self._drains.items() if drain.moved)
        lent = frozenset(
            name for name, drain in self._drains.items() if Wish.LENDING in drain.wishes
        )
        for name in self._shards.pool.ring.shards:
            metrics.shard_drained.labels(name).set(name in names)
        self._shards.pool.drain(names, lent)
        await self._processes.drain(names, lent)

    # --- what is to be loaded elsewhere -----------------------------------------------------

    async def _move(self, shard: str, drain: Drain) -> list[Move]:
        """Load elsewhere what the shard has, until nothing is missing."""
        moves: list[Move] = []
        tried: set[tuple[VersionKey, Residency]] = set()
        while missing := [move for move in await self._missing(shard) if move[:2] not in tried]:
            drain.to_move = drain.done + len(missing)
            for key, residency, last_use_s in missing:
                begin_s, error = time.monotonic(), ""
                try:
                    await residency.ensure(key, min(last_use_s, begin_s))
                except EngineError as refusal:  # the first request tries again
                    error = str(refusal)
                    logger.warning("%s: %s is not loaded: %s", residency.shard, key, refusal)
                moves.append(Move(key, residency.shard, time.monotonic() - begin_s, error))
                tried.add((key, residency))
                drain.done += 1
        return moves

    async def _missing(self, shard: str) -> list[_Missing]:
        """What would not be found loaded if the route moved now, the latest used first."""
        uses = await self._uses()
        # From here on without a step: it is true when this returns.
        source = self._shards.residencies.get(shard)
        if source is None:
            return []
        ring = self._shards.pool.ring.with_state(shard, ShardState.DRAINING)
        last_used_s = _last_used_s(source, uses.get(shard, {}))
        moving = self._worth_moving(last_used_s, source.wanted())
        return [
            _Missing(key, residency, moving[key])
            for name, residency in self._shards.residencies.items()
            if ring.states[name] is ShardState.UP
            for key in _arriving(name, residency, uses.get(name, {}), moving, ring)
        ]

    def _worth_moving(
        self, last_used_s: Mapping[VersionKey, float], wanted: Iterable[VersionKey]
    ) -> dict[VersionKey, float]:
        since_s = time.monotonic() - LATELY_S
        moving = {
            key: used_s
            for key, used_s in last_used_s.items()
            if used_s > since_s or self._shards.has_traffic(key)
        }
        return {**dict.fromkeys(wanted, math.inf), **moving}

    async def _uses(self) -> dict[str, Mapping[VersionKey, Use]]:
        names = list(self._shards.residencies)
        answers = await asyncio.gather(*map(self._processes.uses, names))
        return dict(zip(names, answers, strict=True))

    async def _used_lately(self) -> set[VersionKey]:
        since_s = time.monotonic() - LATELY_S
        return {
            key
            for uses in (await self._uses()).values()
            for key, use in uses.items()
            if use.holds or use.last_use_s > since_s
        }


def _last_used_s(residency: Residency, uses: Mapping[VersionKey, Use]) -> dict[VersionKey, float]:
    """When each version was last used or loaded, on the monotonic clock; inf if it is in use."""
    last_used_s = {}
    for place in residency.places():
        use = uses.get(place.version.key, _UNUSED)
        last_used_s[place.version.key] = (
            math.inf if use.holds else max(place.last_use_s, use.last_use_s)
        )
    return last_used_s


def _arriving(
    name: str,
    residency: Residency,
    uses: Mapping[VersionKey, Use],
    moving: Mapping[VersionKey, float],
    ring: Ring,
) -> list[VersionKey]:
    """What is to be loaded on this shard: no more than is in use later than what has to leave."""
    held = _last_used_s(residency, uses)
    coming = {
        key: used_s
        for key, used_s in moving.items()
        if key not in held and name in ring.replicas(AdapterKey(key.tenant, key.adapter))
    }
    # Of equals, what is there stays.
    ordered = sorted({**held, **coming}.items(), key=lambda item: -item[1])
    return [key for key, _ in ordered[: residency.capacity] if key in coming]
