"""All processes that resolve adapter names and hold loaded versions: workers, and the host.

Implements what `engine/residency.py` (Holders), `engine/slots.py` (SlotHolders) and
`engine/ledger.py` (Audience) ask for, over the pipes to the workers.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence

from engine.core import ClientSlot
from engine.generation import ServedVersion, VersionKey
from engine.pool import ServedAdapter
from engine.quarantine import Quarantined
from engine.residents import Residents, Use
from engine.ring import Plan
from gateway.explanation import Explanation
from gateway.messages import (
    Explain,
    Flush,
    FollowDrains,
    FollowPlan,
    FollowQuarantine,
    Leave,
    Loaded,
    LoadFailed,
    Placed,
    Question,
    RecallSlot,
    ShardDied,
    ShardUp,
    ShowAdapter,
    SlotGranted,
    SlotWithdrawn,
    TellPlaced,
    TellUses,
)
from gateway.worker_process import WorkerProcess
from gateway.workers import WorkerFleet

logger = logging.getLogger(__name__)

FOLLOW_TIMEOUT_S = 5.0
"""How long a change waits for a worker that does not follow it. The change stands already."""
ANSWER_TIMEOUT_S = 1.0
"""How long a worker may take to answer a question that is asked for a better choice only."""


class Processes:
    """The workers and the host, as one."""

    def __init__(self, fleet: WorkerFleet) -> None:
        self._fleet = fleet
        self._own: dict[str, Residents] = {}

    def add_own(self, shard: str, residents: Residents) -> None:
        """The host's own, which uses the shard for probes and evaluations."""
        self._own[shard] = residents

    def drop_own(self, shard: str) -> None:
        """The shard is gone."""
        self._own.pop(shard, None)

    def lose(self, shard: str, crashed: bool, quarantined: Quarantined) -> None:
        """Tell all workers that the shard is gone, and whom to refuse from now on."""
        self._fleet.tell(ShardDied(shard, crashed, quarantined))

    async def screen(self, quarantined: Quarantined) -> None:
        """Have all workers refuse these, and no others; returns when they do."""
        await _followed("the quarantine", self._fleet.ask(FollowQuarantine(quarantined)))

    async def admit(
        self,
        shard: str,
        resident: Sequence[ServedVersion],
        granted: Sequence[VersionKey],
        take_slot: Callable[[], ClientSlot],
    ) -> None:
        """Have all workers drive the shard, which has these versions, and slots for some; returns
        when they do."""
        slots: list[ClientSlot] = []

        def ask(worker: WorkerProcess) -> Question:
            slots.append(take_slot())
            worker.slots.append(slots[-1])
            return ShardUp(slots[-1], resident, granted)

        await _followed(f"{shard}, which is up again", self._fleet.ask_each(ask))
        for slot in slots:
            slot.close()  # the workers have their own copies of the listeners now
        self._fleet.fill()  # there may have been no slot for some

    def show(self, tenant: str, adapter: str, served: ServedAdapter) -> Awaitable[None]:
        """Send the adapter to all at once; awaited, wait until they follow."""
        answers = self._fleet.ask(ShowAdapter(tenant, adapter, served))
        return _followed(f"the change of adapter {adapter}", answers)

    def loaded(self, shard: str, version: ServedVersion) -> None:
        """Tell all that it is resident."""
        if (own := self._own.get(shard)) is not None:
            own.loaded(version)
        self._fleet.tell(Loaded(shard, version))

    def failed(self, shard: str, key: VersionKey, reason: str) -> None:
        """Tell all that it could not be loaded."""
        if (own := self._own.get(shard)) is not None:
            own.failed(key, reason)
        self._fleet.tell(LoadFailed(shard, key, reason))

    async def leave(self, shard: str, key: VersionKey) -> None:
        """Tell all to hand it out no more; returns when nothing runs on it anywhere."""
        own_left = asyncio.Event()
        self._own[shard].leave(key, own_left.set)
        await self._fleet.ask(Leave(shard, key))
        await own_left.wait()

    def granted(self, shard: str, key: VersionKey) -> None:
        """Tell all that the version has a slot."""
        if (own := self._own.get(shard)) is not None:
            own.slots.granted(key)
        self._fleet.tell(SlotGranted(shard, key))

    def withdrawn(self, shard: str, key: VersionKey) -> None:
        """Tell all that the version has none any more; nobody is in it."""
        if (own := self._own.get(shard)) is not None:
            own.slots.withdrawn(key)
        self._fleet.tell(SlotWithdrawn(shard, key))

    def recall(self, shard: str, key: VersionKey) -> Awaitable[None]:
        """Tell all to let nobody enter the slot; awaited, until nothing runs in it anywhere."""
        own_returned = asyncio.Event()
        self._own[shard].slots.recall(key, own_returned.set)
        answers = self._fleet.ask(RecallSlot(shard, key))

        async def returned() -> None:
            await answers
            await own_returned.wait()

        return returned()

    async def uses(self, shard: str) -> Mapping[VersionKey, Use]:
        """How it is used, over all that answer in time."""
        answers: list[Mapping[VersionKey, Use]]
        answers = await self._fleet.ask(TellUses(shard), ANSWER_TIMEOUT_S)
        own = self._own.get(shard)
        total = {} if own is None else dict(own.uses())
        for answer in answers:
            for key, use in answer.items():
                before = total.get(key, Use(0, 0.0))
                total[key] = Use(before.holds + use.holds, max(before.last_use_s, use.last_use_s))
        return total

    async def follow(self, plan: Plan) -> None:
        """Have all choose among these replicas; returns when they follow."""
        await _followed("the plan", self._fleet.ask(FollowPlan(plan)))

    async def drain(self, shards: frozenset[str], lent: frozenset[str]) -> None:
        """Have no process but the host place requests on these shards, and all of them on the
        others; `lent` are, or are about to be. Returns when they follow."""
        await _followed("the drain of shards", self._fleet.ask(FollowDrains(shards, lent)))

    async def placed(self) -> list[Placed]:
        """What the workers have in flight, of those that answer in time."""
        return await self._fleet.ask(TellPlaced(), ANSWER_TIMEOUT_S)

    async def explain(self, request: Explain) -> list[Explanation]:
        """Where each worker would send a request, of those that answer in time and know it."""
        told: list[Explanation | None] = await self._fleet.ask(request, ANSWER_TIMEOUT_S)
        return [explanation for explanation in told if explanation is not None]

    async def flush(self) -> None:
        """Have all outcomes of ended requests sent, by all that answer in time."""
        await self._fleet.ask(Flush(), ANSWER_TIMEOUT_S)


async def _followed(change: str, answers: Awaitable[object]) -> None:
    try:
        await asyncio.wait_for(answers, FOLLOW_TIMEOUT_S)
    except TimeoutError:
        logger.error("a worker does not follow %s", change)
