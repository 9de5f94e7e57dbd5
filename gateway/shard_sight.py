"""How each shard does, for the status page: asked of the cores, and of the workers."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Collection, Iterable, Mapping

from engine.generation import Load, VersionKey
from engine.residency import Place, Residency
from engine.residents import Use
from engine.slots import AdapterSlots, Turn, TurnState
from gateway.keeper import ShardKeeper
from gateway.keeper_state import KeeperState
from gateway.shard_gauges import load_of
from gateway.sights import Sights
from gateway.status import ResidentStatus, ShardStatus, TurnStatus

LOAD_TIMEOUT_S = 0.5
"""The page does not wait for a core that is in a long step, and tells that it does not answer."""
SHARDS_ASKED = 8
"""Of how many shards all workers are asked at once how they use it. With more, each has its turn:
64 shards and 32 workers would be 2,048 questions a second."""
RESIDENTS_SHOWN = 12
TURNS_SHOWN = 12
"""Of those who have slots and of those who wait, each."""
DRAINED = "drained"
"""State of a shard that is up and takes no requests."""

_UNUSED = Use(0, 0.0)


class ShardSight:
    """Reads the state of all shards. Remembers of each what the workers told last."""

    def __init__(self) -> None:
        self._uses: dict[str, Mapping[VersionKey, Use]] = {}
        self._turns: deque[str] = deque()

    async def read(
        self, keepers: Collection[ShardKeeper], sights: Sights | None
    ) -> list[ShardStatus]:
        """All shards as they are now."""
        residencies = {} if sights is None or sights.shards is None else sights.shards.residencies
        loads, _ = await asyncio.gather(
            asyncio.gather(*map(_load, keepers)), self._ask(residencies, sights)
        )
        drained, slots = frozenset[str](), dict[str, AdapterSlots]()
        if sights is not None and sights.shards is not None:
            drained, slots = sights.shards.pool.drained, sights.shards.slots
        return [
            self._status(
                *(keeper, load, residencies.get(keeper.name), slots.get(keeper.name)),
                keeper.name in drained,
            )
            for keeper, load in zip(keepers, loads, strict=True)
        ]

    async def _ask(self, residencies: Iterable[str], sights: Sights | None) -> None:
        """Ask the workers of those shards whose turn it is."""
        if sights is None:
            return
        names = set(residencies)
        self._turns = deque(name for name in self._turns if name in names)
        self._turns.extend(sorted(names.difference(self._turns)))
        self._uses = {name: uses for name, uses in self._uses.items() if name in names}
        asked = [self._turns.popleft() for _ in range(min(SHARDS_ASKED, len(self._turns)))]
        self._turns.extend(asked)
        answers = await asyncio.gather(*map(sights.processes.uses, asked))
        self._uses.update(zip(asked, answers, strict=True))

    def _status(
        self,
        keeper: ShardKeeper,
        load: Load | None,
        residency: Residency | None,
        slots: AdapterSlots | None,
        drained: bool,
    ) -> ShardStatus:
        places = [] if residency is None else residency.places()
        residents = _residents(places, self._uses.get(keeper.name, {}))
        turns = [] if slots is None else slots.turns
        held = [turn for turn in turns if turn.state is not TurnState.WAITING]
        waiting = turns[len(held) :]
        return ShardStatus(
            name=keeper.name,
            state=DRAINED if drained and keeper.state is KeeperState.UP else keeper.state.value,
            since_s=keeper.since_s,
            reason=_reason(keeper),
            restarts=keeper.restarts,
            answers=load is not None,
            **(load or Load(0, 0, 0, 0.0))._asdict(),
            slots_left=keeper.slots_left,
            batch_slots=0 if slots is None else slots.capacity,
            turns=[*map(_turn, [*held[:TURNS_SHOWN], *waiting[:TURNS_SHOWN]])],
            turns_held=len(held),
            turns_waiting=len(waiting),
            places=0 if residency is None else residency.capacity,
            resident_count=len(places),
            residents=residents[:RESIDENTS_SHOWN],
        )


def _residents(places: Iterable[Place], uses: Mapping[VersionKey, Use]) -> list[ResidentStatus]:
    """Those in use first, then those used last, then those loaded last."""
    monotonic_begin_s = time.time() - time.monotonic()
    statuses = []
    for place in places:
        use = uses.get(place.version.key, _UNUSED)
        used_s = round(monotonic_begin_s + use.last_use_s, 1) if use.last_use_s else None
        statuses.append(
            ResidentStatus(
                adapter=place.version.adapter,
                version=place.version.version,
                load_time_s=place.load_time_s,
                load_duration_s=place.load_duration_s,
                holds=use.holds,
                last_use_time_s=used_s,
            )
        )
    return sorted(
        statuses,
        key=lambda status: (-status.holds, -(status.last_use_time_s or 0.0), -status.load_time_s),
    )


def _turn(turn: Turn) -> TurnStatus:
    since_s = round(time.time() - time.monotonic() + turn.since_s, 1)
    return TurnStatus(turn.key.adapter, turn.key.version, turn.state.value, since_s)


def _reason(keeper: ShardKeeper) -> str:
    """What went wrong last, while the shard is not up."""
    if keeper.state is KeeperState.UP or not keeper.notes:
        return ""
    return keeper.notes[-1].text


async def _load(keeper: ShardKeeper) -> Load | None:
    return None if keeper.shard is None else await load_of(keeper.shard, LOAD_TIMEOUT_S)
