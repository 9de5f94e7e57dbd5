"""Random crowds of requests over several processes and few slots, with messages on their way.

What must hold at every moment: no more versions run than there are slots, over all processes and
as the core sees it. And at the end: everybody was answered, nobody waited for longer than the
turns before it take, and nothing is held any more.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest

from engine import residency as residency_module
from engine import residents as residents_module
from engine import slot_holds as slot_holds_module
from engine import slots as slots_module
from engine.generation import ServedVersion, VersionKey
from engine.residency import Residency
from engine.slots import MIN_TENURE_S, AdapterSlots, SlotHolders
from tests.engine.crowd import MOST_DELAY_S, Core, Crowd, Process, Stock
from tests.engine.virtual_time import VirtualTimeLoop

KEYS = [VersionKey("acme", f"adapter-{number}", 1) for number in range(7)]
PLACES = 5
REQUESTS = 250
ARRIVALS_S = 20.0
"""In which all requests come."""
RUN_S = 2.0
"""How long a request lasts at most."""
ABORT_S = 0.1
"""How long an abort is on its way to the core at most."""
GIVE_UP_S = 1.0
TURN_S = RUN_S + ABORT_S + MIN_TENURE_S + 10 * MOST_DELAY_S
"""The longest turn of a version that others wait for."""
DONE_S = 600.0
"""Of virtual time; this only ends a run that hangs."""


class Watched(AdapterSlots):
    """Notes how long each version waited, and behind how many."""

    def __init__(self, shard: str, capacity: int, holders: SlotHolders) -> None:
        super().__init__(shard, capacity, holders)
        self.wanted: dict[VersionKey, tuple[float, int]] = {}
        """Since when each waits, and how many waited before it."""
        self.waits: list[tuple[float, int]] = []

    def note_waiting(self, key: VersionKey, process: int, waits: bool) -> None:
        if waits and key not in self._waiting:
            self.wanted[key] = asyncio.get_running_loop().time(), len(self._waiting)
        super().note_waiting(key, process, waits)

    def granted_now(self, key: VersionKey) -> None:
        if (wanted := self.wanted.pop(key, None)) is not None:
            since_s, ahead = wanted
            self.waits.append((asyncio.get_running_loop().time() - since_s, ahead))


class SlotCrowd(Crowd):
    """A crowd whose core fails the test when too many versions run."""

    world: World

    def granted(self, shard: str, key: VersionKey) -> None:
        self.world.slots.granted_now(key)
        super().granted(shard, key)


class World:
    """A core with slots, its processes, and requests that come and go."""

    def __init__(self, seed: int, max_loras: int) -> None:
        self.random = random.Random(seed)
        self.max_loras = max_loras
        self.core = Core(PLACES)
        self.core.load_s, self.core.unload_s = 0.004, 0.001
        self.stock = Stock(*KEYS)
        self.crowd = SlotCrowd(self.core, 3, delays=self.random)
        self.crowd.world = self
        self.slots = Watched(self.core.name, max_loras, self.crowd)
        self.residency = Residency(self.core, PLACES, self.stock, self.crowd, left=self.slots.left)
        self.crowd.serve(self.residency, self.slots)
        self.tasks: dict[Process, set[asyncio.Task[None]]] = {}
        self.running: Counter[VersionKey] = Counter()
        self.outcomes: Counter[str] = Counter()

    async def live(self) -> None:
        runs = [asyncio.create_task(run) for run in (self.residency.run(), self.slots.run())]
        lives: asyncio.Future[Any] = asyncio.gather(
            *(self._request() for _ in range(REQUESTS)),
            *(self._remove() for _ in range(4)),
            self._join(),
            self._die(),
        )
        watched: tuple[asyncio.Future[Any], ...] = (*runs, lives)
        done, _ = await asyncio.wait(watched, timeout=DONE_S, return_when=asyncio.FIRST_COMPLETED)
        for run in runs:
            if run.done():
                await run
        assert done, f"somebody waits for ever: {self.slots.__dict__}"
        await lives
        await asyncio.sleep(TURN_S)  # what is recalled is given back
        self._check()
        for run in runs:
            run.cancel()
        await asyncio.gather(*runs, return_exceptions=True)
        for process in self.crowd.processes:
            await process.residents.close()

    def _check(self) -> None:
        assert self.outcomes["answered"] > REQUESTS / 3
        assert sum(self.outcomes.values()) == REQUESTS
        assert self.slots.waits, "somebody waited"
        for waited_s, ahead in self.slots.waits:
            assert waited_s <= (ahead + 1) * TURN_S, f"behind {ahead} others"
        assert not self.slots.are_contended
        assert len(self.slots.granted) <= self.max_loras
        assert not +self.core.requests and not +self.running
        for process in self.crowd.processes:
            holds = process.residents.slots
            assert not holds._queues and not holds._recalled
            assert set(holds._slots) == set(self.slots.granted), "all know who has a slot"
            assert not any(slot.running for slot in holds._slots.values())
            assert not any(use.holds for use in process.residents.uses().values())

    async def _while(self, most_s: float) -> None:
        await asyncio.sleep(self.random.uniform(0.0, most_s))

    async def _request(self) -> None:
        await self._while(ARRIVALS_S)
        process = self.random.choice(self.crowd.processes)
        key = self.random.choices(KEYS, weights=[8, 5, 3, 2, 1, 1, 1])[0]
        generation = asyncio.create_task(self._generate(process, key))
        tasks = self.tasks.setdefault(process, set())
        tasks.add(generation)
        generation.add_done_callback(tasks.discard)
        timeout_s = GIVE_UP_S if self.random.random() < 0.2 else None
        done, _ = await asyncio.wait((generation,), timeout=timeout_s)
        if not done:
            generation.cancel()
            await asyncio.wait((generation,))
        if generation.cancelled():
            self.outcomes["gave up or died"] += 1
        else:
            generation.result()
            self.outcomes["answered"] += 1

    async def _generate(self, process: Process, key: VersionKey) -> None:
        """As a lease does it, and the edge in it. An abort reaches the core late."""
        residents = process.residents
        resident = await residents.hold(key)
        slot = None
        try:
            slot = residents.slots.enter(key, resident.version.lora_int_id)
            if slot is None:
                slot = await residents.slots.wait(key, resident.version.lora_int_id)
            self.running[key] += 1
            try:
                self._count(self.running, "processes")
                await self._while(RUN_S / 3)
                await self._compute(process, resident.version)
            finally:
                self.running[key] -= 1
        finally:
            if slot is not None:
                residents.slots.leave(slot)
            residents.release(resident)

    async def _compute(self, process: Process, version: ServedVersion) -> None:
        process.begin(version)
        ids = Counter[int]()
        for (_, lora_int_id), count in self.core.requests.items():
            ids[lora_int_id] += count
        self._count(ids, "the core")
        try:
            await self._while(2 * RUN_S / 3)
        except asyncio.CancelledError:
            delay_s = self.random.uniform(0.0, ABORT_S)
            asyncio.get_running_loop().call_later(delay_s, process.forget, version)
            raise
        process.forget(version)

    def _count(self, running: Counter[Any], where: str) -> None:
        assert len(+running) <= self.max_loras, f"too many versions in {where}"

    async def _remove(self) -> None:
        """As a deletion does it: refuse it first. Later it is there again."""
        await self._while(ARRIVALS_S)
        key = self.random.choice(KEYS)
        if key in self.stock.refused:
            return
        await self.residency.remove(key)

    async def _join(self) -> None:
        await self._while(ARRIVALS_S / 2)
        self.crowd.join()

    async def _die(self) -> None:
        """A process dies: it says nothing more, and what it has in the core is aborted."""
        await asyncio.sleep(ARRIVALS_S / 2)
        process = self.random.choice(self.crowd.processes)
        for task in [*self.tasks.get(process, ())]:
            task.cancel()
        self.crowd.die(process, ABORT_S + 0.01)
        self.slots.forget(process.index)
        if len(self.crowd.processes) < 2:
            self.crowd.join()


@pytest.mark.parametrize("max_loras", [1, 2, 3, 4])
@pytest.mark.parametrize("seed", range(8))
def test_versions_take_turns_and_no_more_run_than_have_slots(
    seed: int, max_loras: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(residency_module, "SURVEY_INTERVAL_S", 0.05)
    loop = VirtualTimeLoop()
    clock = SimpleNamespace(monotonic=loop.time, time=loop.time)
    for module in (residency_module, residents_module, slot_holds_module, slots_module):
        monkeypatch.setattr(module, "time", clock)
    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        runner.run(World(seed, max_loras).live())
