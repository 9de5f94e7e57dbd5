"""Several processes that send requests to one core, and the host that tells them what is loaded.

All in memory, with the real `Residents` in each process. The core fails the test where vLLM's
would be harmed: more adapters than it has room for, one removed under a request, an id that is
used again after a failed load.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace

from engine.adapter_loader import LoadPhase, LoadTimes
from engine.errors import AdapterLoadFailed, GenerationFailed, LoadFault, ShardUnavailable
from engine.generation import ServedVersion, VersionKey
from engine.residency import Residency
from engine.residents import Residents, Use
from engine.slot_holds import SlotHolds
from engine.slots import AdapterSlots

SHARD = "shard-0"
MOST_DELAY_S = 0.002
"""How long a message is on its way at most, where there are delays."""


class Core:
    """What one engine has loaded, and which requests run on it."""

    def __init__(self, places: int) -> None:
        self.places = places
        self.loaded: dict[int, ServedVersion] = {}
        """By `lora_int_id`."""
        self.requests: Counter[tuple[int, int]] = Counter()
        """By process and `lora_int_id`."""
        self.loads: list[VersionKey] = []
        """Each attempt, in order."""
        self.refusals: Counter[VersionKey] = Counter()
        """How many of its next loads fail, by version."""
        self.dead = False
        self.unloads_fail = 0
        """How many of the next ones fail."""
        self.load_s = self.unload_s = 0.0
        """How long each takes."""
        self.may_load = asyncio.Event()
        self.may_load.set()
        self._spoiled: set[int] = set()

    @property
    def name(self) -> str:
        return SHARD

    @property
    def keys(self) -> set[VersionKey]:
        """What is loaded."""
        return {version.key for version in self.loaded.values()}

    async def load(self, version: ServedVersion) -> LoadTimes:
        self.loads.append(version.key)
        await self.may_load.wait()
        await asyncio.sleep(self.load_s)
        if self.dead:
            raise ShardUnavailable(SHARD)
        assert version.lora_int_id not in self._spoiled, "half an adapter may have this id"
        assert version.key not in self.keys, "loaded twice"
        assert len(self.loaded) < self.places, "vLLM would drop another one by itself"
        if self.refusals[version.key]:
            self.refusals[version.key] -= 1
            self._spoiled.add(version.lora_int_id)
            raise GenerationFailed("shapes do not match")
        self.loaded[version.lora_int_id] = version
        return {LoadPhase.COMMIT: self.load_s}

    async def unload(self, version: ServedVersion) -> None:
        running = [id for (_, id), count in self.requests.items() if count]
        assert version.lora_int_id not in running, "removed under a request"
        await asyncio.sleep(self.unload_s)
        if self.dead or self.unloads_fail:
            self.unloads_fail = max(0, self.unloads_fail - 1)
            raise ShardUnavailable(SHARD)
        del self.loaded[version.lora_int_id]


class Stock:
    """Where versions lie that can be loaded: all that are put there."""

    def __init__(self, *keys: VersionKey) -> None:
        self._ids = 0
        self.versions = {key: self._version(key) for key in keys}
        self.refused: dict[VersionKey, str] = {}
        """Why a version may not be loaded."""
        self.fails: Exception | None = None
        """What looking for any raises."""

    def _version(self, key: VersionKey) -> ServedVersion:
        self._ids += 1
        return ServedVersion(*key, self._ids, f"/{key.adapter}/{key.version}", "digest")

    async def find(self, key: VersionKey) -> ServedVersion:
        await asyncio.sleep(0)
        if self.fails is not None:
            raise self.fails
        if key in self.refused:
            raise AdapterLoadFailed(*key[1:], self.refused[key], LoadFault.STATE)
        return self.versions[key]

    async def with_new_id(self, version: ServedVersion) -> ServedVersion:
        self._ids += 1
        renamed = replace(version, lora_int_id=self._ids)
        self.versions[version.key] = renamed
        return renamed


class Link:
    """Carries messages in their order; with `delays`, each arrives a while later. Cut, it carries
    none any more."""

    def __init__(self, delays: random.Random | None) -> None:
        self.cut = False
        self._delays = delays
        self._due_s = 0.0

    def send(self, deliver: Callable[[], None]) -> None:
        if self.cut:
            return
        if self._delays is None:
            deliver()
            return
        loop = asyncio.get_running_loop()
        arrival_s = loop.time() + self._delays.uniform(0.0, MOST_DELAY_S)
        self._due_s = max(arrival_s, self._due_s + 1e-6)  # never before the one that was sent first
        loop.call_at(self._due_s, deliver)


class Process:
    """One process: its residents, its requests in the core, and its links to the host."""

    def __init__(self, core: Core, index: int, delays: random.Random | None) -> None:
        self._core = core
        self.index = index
        self.from_host, self._to_host = Link(delays), Link(delays)
        self._when_buried: list[Callable[[], None]] = []
        self.residency: Residency | None = None
        self.slots: AdapterSlots | None = None
        """Who shares out slots; None: everybody has one."""
        holds = SlotHolds(self._tell_waiting, self._in_core)
        self.residents = Residents(self._ask, self._in_core, holds, self._tell_idle)

    def _ask(self, key: VersionKey) -> None:
        assert self.residency is not None
        want = self.residency.want
        self._to_host.send(lambda: want(key))

    def _tell_waiting(self, key: VersionKey, waits: bool) -> None:
        if (slots := self.slots) is not None:
            self._to_host.send(lambda: slots.note_waiting(key, self.index, waits))
        elif waits:
            self.residents.slots.granted(key)

    def _tell_idle(self) -> None:
        if (slots := self.slots) is not None:
            self._to_host.send(slots.look)

    async def _in_core(self, lora_int_id: int) -> int:
        await asyncio.sleep(0)
        return self._core.requests[self.index, lora_int_id]

    def begin(self, version: ServedVersion) -> None:
        """The core has a request of ours on that version from now on."""
        assert version.lora_int_id in self._core.loaded, "vLLM would read it in the next step"
        self._core.requests[self.index, version.lora_int_id] += 1

    def forget(self, version: ServedVersion) -> None:
        """The core knows one request less."""
        self._core.requests[self.index, version.lora_int_id] -= 1

    def answer(self, reply: Callable[[], None]) -> None:
        """Tell the host something that it asked for."""
        self._to_host.send(reply)

    def ask(self, question: Callable[[], None], when_buried: Callable[[], None]) -> None:
        """Host: ask it something. If it is dead, or dies, it counts as having answered later."""
        self._when_buried.append(when_buried)
        self.from_host.send(question)

    def die(self) -> None:
        """Say nothing to the host any more, and hear nothing."""
        self.from_host.cut = self._to_host.cut = True

    def bury(self) -> None:
        """The core has forgotten all that it left there."""
        for answer in self._when_buried:
            answer()


class Crowd:
    """The processes of one core, as its residency sees them."""

    def __init__(self, core: Core, processes: int = 1, *, delays: random.Random | None = None):
        self._core = core
        self._delays = delays
        self.processes = [Process(core, index, delays) for index in range(processes)]
        self.residency: Residency | None = None
        self.slots: AdapterSlots | None = None
        self._dying: list[Process] = []
        self.may_answer = asyncio.Event()
        """While this is not set, nobody answers how it uses what is loaded."""
        self.may_answer.set()

    def serve(self, residency: Residency, slots: AdapterSlots | None = None) -> None:
        """Ask these from now on."""
        self.residency, self.slots = residency, slots
        for process in self.processes:
            process.residency, process.slots = residency, slots

    def join(self) -> Process:
        """One more process, which is told first what is loaded now."""
        assert self.residency is not None
        process = Process(self._core, len(self.processes), self._delays)
        process.residency, process.slots = self.residency, self.slots
        resident = self.residency.resident()
        process.from_host.send(lambda: process.residents.all_loaded(resident))
        if self.slots is not None:
            granted = self.slots.granted
            process.from_host.send(lambda: process.residents.slots.all_granted(granted))
        self.processes.append(process)
        return process

    def die(self, process: Process, buried_after_s: float) -> None:
        """A process dies, and what it left in the core is aborted so much later."""
        process.die()
        self.processes.remove(process)
        self._dying.append(process)

        def bury() -> None:
            self._dying.remove(process)
            process.bury()

        asyncio.get_running_loop().call_later(buried_after_s, bury)

    def loaded(self, shard: str, version: ServedVersion) -> None:
        for process in self.processes:
            process.from_host.send(lambda p=process: p.residents.loaded(version))  # type: ignore[misc]

    def failed(self, shard: str, key: VersionKey, reason: str) -> None:
        for process in self.processes:
            process.from_host.send(lambda p=process: p.residents.failed(key, reason))  # type: ignore[misc]

    def granted(self, shard: str, key: VersionKey) -> None:
        for process in self.processes:
            process.from_host.send(lambda p=process: p.residents.slots.granted(key))  # type: ignore[misc]

    def withdrawn(self, shard: str, key: VersionKey) -> None:
        for process in self.processes:
            process.from_host.send(lambda p=process: p.residents.slots.withdrawn(key))  # type: ignore[misc]

    def recall(self, shard: str, key: VersionKey) -> Awaitable[None]:
        return _all([_recalled(process, key) for process in (*self.processes, *self._dying)])

    async def leave(self, shard: str, key: VersionKey) -> None:
        everybody = (*self.processes, *self._dying)
        await asyncio.gather(*(_left(process, key) for process in everybody))

    async def uses(self, shard: str) -> Mapping[VersionKey, Use]:
        await self.may_answer.wait()
        total: dict[VersionKey, Use] = {}
        for uses in await asyncio.gather(*(_uses(process) for process in self.processes)):
            for key, use in uses.items():
                before = total.get(key, Use(0, 0.0))
                total[key] = Use(before.holds + use.holds, max(before.last_use_s, use.last_use_s))
        return total


async def _all(events: list[asyncio.Event]) -> None:
    for event in events:
        await event.wait()


def _recalled(process: Process, key: VersionKey) -> asyncio.Event:
    returned = asyncio.Event()

    def answer() -> None:
        process.answer(returned.set)

    process.ask(lambda: process.residents.slots.recall(key, answer), returned.set)
    return returned


async def _left(process: Process, key: VersionKey) -> None:
    left = asyncio.Event()
    process.ask(lambda: process.residents.leave(key, lambda: process.answer(left.set)), left.set)
    await left.wait()


async def _uses(process: Process) -> Mapping[VersionKey, Use]:
    answer: asyncio.Future[Mapping[VersionKey, Use]] = asyncio.get_running_loop().create_future()

    def settle(uses: Mapping[VersionKey, Use]) -> None:
        if not answer.done():
            answer.set_result(uses)

    def tell() -> None:
        uses = process.residents.uses()
        process.answer(lambda: settle(uses))

    process.ask(tell, lambda: settle({}))
    return await answer
