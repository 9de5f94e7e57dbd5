"""Who has the slots of one shard, as the host decides it: turns, in order of arrival.

    wants -> (a slot is free) -> granted -> recalled -> (nothing runs in it) -> free
             (an idle version has one: it is recalled)
             (all are busy: the one that has had its slot for longest is recalled)

An engine computes with at most `max_loras` adapters in one batch. vLLM lets requests of others
pass those which do not fit, for as long as those others come (vllm/v1/core/sched/
scheduler.py:938): a few busy adapters would starve the rest. So a version enters the engine only
while it has a slot here, and its slot is taken from it in turn: whoever waits, waits for requests
that run, and never for new ones (ADR 0012).
"""

from __future__ import annotations

import asyncio
import enum
import time
from collections.abc import Awaitable, Callable, Container, Mapping
from typing import NamedTuple, Protocol

from engine.generation import VersionKey
from engine.residents import Use

MIN_TENURE_S = 0.25
"""How long a busy version keeps its slot at least: what waits for it gets into one batch."""
MOST_DRAINED = 0.25
"""Share of the requests that run which may be of slots that are being given back, where there are
several: as they end, no others take their places in the batch."""
SURVEY_INTERVAL_S = 1.0
"""How often is looked for an idle version at least, while others wait. Processes tell of one as
soon as it is idle."""


class SlotHolders(Protocol):
    """All processes that send requests to the shard."""

    def granted(self, shard: str, key: VersionKey) -> None:
        """Tell all that the version has a slot."""

    def withdrawn(self, shard: str, key: VersionKey) -> None:
        """Tell all that the version has none any more; nobody is in it."""

    def recall(self, shard: str, key: VersionKey) -> Awaitable[None]:
        """Tell all, before this returns, to let nobody enter the slot; awaited, until nothing runs
        in it anywhere."""

    async def uses(self, shard: str) -> Mapping[VersionKey, Use]:
        """How what is loaded is used, over all. Each process tells `AdapterSlots.look` once when
        something is idle after that."""


class TurnState(enum.Enum):
    """How a version stands to the slots."""

    HELD = "held"
    RETURNING = "returning"
    """Its slot is recalled; what runs in it goes on."""
    WAITING = "waiting"


class Turn(NamedTuple):
    """One version that has a slot, or waits for one."""

    key: VersionKey
    state: TurnState
    since_s: float
    """When it got into that state, on the monotonic clock."""


class _Recall(NamedTuple):
    """A slot on its way back."""

    task: asyncio.Task[None]
    """Ends when nothing runs in it."""
    gap: int
    """How many of its requests end before the last, and leave the batch emptier."""
    since_s: float


class _Wait(NamedTuple):
    """A version that waits for a slot."""

    since_s: float
    processes: set[int]
    """Where requests wait for it."""


class AdapterSlots:
    """The slots of one shard. `run` owns what is recalled."""

    def __init__(
        self,
        shard: str,
        capacity: int,
        holders: SlotHolders,
        observe_waiting: Callable[[str, int], None] = lambda shard, count: None,
    ) -> None:
        """`capacity` is `max_loras`. `observe_waiting` is told how many versions wait, whenever
        that changes."""
        self._shard = shard
        self._capacity = capacity
        self._holders = holders
        self._observe_waiting = observe_waiting
        self._open: dict[VersionKey, float] = {}
        """Since when each has its slot, the longest first."""
        self._recalls: dict[VersionKey, _Recall] = {}
        """Of slots that are being given back."""
        self._abandoned: set[asyncio.Task[None]] = set()
        """Recalls of slots that were granted again meanwhile."""
        self._waiting: dict[VersionKey, _Wait] = {}
        """In the order of arrival."""
        self._changed = asyncio.Event()

    @property
    def granted(self) -> list[VersionKey]:
        """Who has a slot, for a process that joins."""
        return [*self._open]

    @property
    def capacity(self) -> int:
        """How many slots there are."""
        return self._capacity

    @property
    def turns(self) -> list[Turn]:
        """Who has a slot, who gives one back, and who waits; of each, for longest first."""
        return [
            *(Turn(key, TurnState.HELD, since_s) for key, since_s in self._open.items()),
            *(Turn(key, TurnState.RETURNING, r.since_s) for key, r in self._recalls.items()),
            *(Turn(key, TurnState.WAITING, wait.since_s) for key, wait in self._waiting.items()),
        ]

    @property
    def are_contended(self) -> bool:
        """Whether any version waits."""
        return bool(self._waiting)

    def may_enter(self, key: VersionKey, in_use: Container[VersionKey]) -> bool:
        """Whether a request of this version would wait for no other version's requests; those
        `in_use` have some that run."""
        if key in self._open:
            return True
        busy = len(self._recalls) + sum(other in in_use for other in self._open)
        return not self._waiting and busy < self._capacity

    def note_waiting(self, key: VersionKey, process: int, waits: bool) -> None:
        """In this process requests wait for the version, or none does any more."""
        if not waits:
            self._give_up(key, process)
        elif key not in self._open:  # else the grant is on its way there
            wait = self._waiting.setdefault(key, _Wait(time.monotonic(), set()))
            wait.processes.add(process)
            self._grant()

    def look(self) -> None:
        """A version is idle somewhere that was not."""
        self._changed.set()

    def forget(self, process: int) -> None:
        """A process died, and nothing waits there any more."""
        for key in [*self._waiting]:
            self._give_up(key, process)

    def left(self, key: VersionKey) -> None:
        """Nobody holds the version any more, so its slot goes back as well."""
        if self._open.pop(key, None) is not None:
            self._holders.withdrawn(self._shard, key)
            self._grant()

    async def run(self) -> None:
        """Take slots from those who have them for those who wait, until cancelled."""
        try:
            while True:
                self._changed.clear()
                if self._lacking > 0:
                    await self._survey()
                await self._until_changed()
        finally:
            tasks = [*(recall.task for recall in self._recalls.values()), *self._abandoned]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    @property
    def _lacking(self) -> int:
        """How many slots more are to be recalled."""
        return len(self._waiting) - len(self._recalls)

    async def _survey(self) -> None:
        """Recall the slots that are idle; and busy ones, if too few are."""
        uses = await self._holders.uses(self._shard)
        # One that is not in use by anybody is about to leave, or its requests are on their way.
        idle = [key for key in self._open if key in uses and not uses[key].holds]
        idle.sort(key=lambda key: uses[key].last_use_s)
        for key in idle[: max(0, self._lacking)]:
            self._recall(key, 0)
        before_s = time.monotonic() - MIN_TENURE_S
        running = {key: uses[key].holds if key in uses else 0 for key in self._open}
        drained = sum(recall.gap for recall in self._recalls.values())
        most = MOST_DRAINED * (sum(running.values()) + drained)
        for key in [key for key, since_s in self._open.items() if since_s <= before_s]:
            gap = max(0, running[key] - 1)
            if gap and drained and drained + gap > most:
                most = 0.0  # none that has its slot for less long goes before it
            elif self._lacking > 0:
                drained += gap
                self._recall(key, gap)

    async def _until_changed(self) -> None:
        """Wait until something may be recalled."""
        timeout_s = None
        if self._lacking > 0:
            timeout_s = SURVEY_INTERVAL_S
            now_s = time.monotonic()
            growing_s = [since_s + MIN_TENURE_S - now_s for since_s in self._open.values()]
            timeout_s = min([timeout_s, *(left_s for left_s in growing_s if left_s > 0.0)])
        try:
            async with asyncio.timeout(timeout_s):
                await self._changed.wait()
        except TimeoutError:
            pass

    def _recall(self, key: VersionKey, gap: int) -> None:
        # From here on no process that joins is told of it, and whoever wants it waits.
        del self._open[key]
        returned = self._holders.recall(self._shard, key)
        task = asyncio.create_task(self._take_back(key, returned))
        self._recalls[key] = _Recall(task, gap, time.monotonic())

    async def _take_back(self, key: VersionKey, returned: Awaitable[None]) -> None:
        await returned
        recall = self._recalls.get(key)
        if recall is not None and recall.task is asyncio.current_task():
            del self._recalls[key]
            self._grant()

    def _grant(self) -> None:
        """Give what is free to those who wait, the first first."""
        for key in [*self._waiting]:
            if (recall := self._recalls.pop(key, None)) is not None:
                # Those before it got other slots. This one was not given back yet: it keeps it.
                self._abandoned.add(recall.task)
                recall.task.add_done_callback(self._abandoned.discard)
            elif len(self._open) + len(self._recalls) >= self._capacity:
                break
            del self._waiting[key]
            self._open[key] = time.monotonic()
            self._holders.granted(self._shard, key)
        self._note_change()

    def _give_up(self, key: VersionKey, process: int) -> None:
        if (wait := self._waiting.get(key)) is None:
            return
        wait.processes.discard(process)
        if not wait.processes:
            del self._waiting[key]
            self._grant()  # of those behind, the first may be one that is recalled

    def _note_change(self) -> None:
        self._observe_waiting(self._shard, len(self._waiting))
        self._changed.set()
