"""The shards as the host holds them: what each has loaded, and who is up.

    core runs -> join -> warm -> open: the ring places requests on it -> lose -> join -> ...

Owned by the control plane.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Collection, Mapping, Sequence
from functools import partial

from engine.errors import EngineError, ShardUnavailable
from engine.generation import ServedVersion, VersionKey
from engine.loader import Versions
from engine.pool import ServedView, ShardPool
from engine.residency import Residency
from engine.residents import Residents
from engine.ring import AdapterKey, ShardState
from engine.shard import VllmShard
from engine.slot_holds import SlotHolds
from engine.slots import AdapterSlots
from gateway import metrics
from gateway.messages import WaitsForSlot, WentIdle
from gateway.processes import Processes

logger = logging.getLogger(__name__)

HOST = 0
"""Stands for the host among the processes that wait for slots; workers have their process id."""


class Shards:
    """All shards of one gateway, for the host's own requests and for those who load."""

    def __init__(
        self,
        names: Sequence[str],
        places: int,
        max_loras: int,
        versions: Versions,
        processes: Processes,
        view: ServedView,
    ) -> None:
        """`names` are those of all shards; each has so many `places` for adapters, and computes
        with `max_loras` of them at once."""
        for name in names:
            metrics.know_shard(name)
        self.pool = ShardPool((), {}, view, names)
        self.residencies: dict[str, Residency] = {}
        """Of the shards whose cores run."""
        self.slots: dict[str, AdapterSlots] = {}
        """Likewise."""
        self._residents: dict[str, Residents] = {}
        self._joined: dict[str, VllmShard] = {}
        self._places = places
        self._max_loras = max_loras
        self._versions = versions
        self._processes = processes
        self._view = view
        self.routing = asyncio.Lock()
        """Held by who changes where adapters belong, while copies are loaded for that."""
        self._tasks: asyncio.TaskGroup | None = None
        self._runs: dict[str, list[asyncio.Task[None]]] = {}
        """Loads and turns that run, by shard."""
        self._lost: dict[str, list[VersionKey]] = {}
        """What a shard had loaded when its core died."""

    @property
    def granted(self) -> Mapping[str, Sequence[VersionKey]]:
        """Which versions have slots of each shard now."""
        return {name: slots.granted for name, slots in self.slots.items()}

    @property
    def resident(self) -> Mapping[str, Sequence[ServedVersion]]:
        """What each shard has loaded now."""
        return {name: residency.resident() for name, residency in self.residencies.items()}

    async def run(self) -> None:
        """Load what is wanted, until cancelled."""
        try:
            async with asyncio.TaskGroup() as tasks:
                self._tasks = tasks
                for name in self.residencies:
                    self._start(name, tasks)
                await asyncio.Event().wait()
        finally:
            self._tasks = None  # a core may die while the gateway ends

    def join(self, shard: VllmShard) -> None:
        """Load adapters on this shard when they are wanted there. Nobody is sent there yet."""
        slots = AdapterSlots(
            shard.name, self._max_loras, self._processes, metrics.observe_slot_waiting
        )
        residency = Residency(
            shard,
            self._places,
            self._versions,
            self._processes,
            metrics.observe_load,
            metrics.observe_resident,
            metrics.observe_load_failure,
            slots.left,
        )
        metrics.observe_resident(shard.name, 0)
        metrics.observe_slot_waiting(shard.name, 0)
        holds = SlotHolds(
            lambda key, waits: slots.note_waiting(key, HOST, waits),
            shard.requests_of,
            partial(metrics.observe_slot_wait, shard.name),
        )
        residents = Residents(residency.want, shard.requests_of, holds, slots.look)
        self._processes.add_own(shard.name, residents)
        self.residencies[shard.name] = residency
        self.slots[shard.name] = slots
        self._residents[shard.name] = residents
        self._joined[shard.name] = shard
        if self._tasks is not None:
            self._start(shard.name, self._tasks)

    def _start(self, name: str, tasks: asyncio.TaskGroup) -> None:
        work = self.residencies[name].run(), self.slots[name].run()
        self._runs[name] = [tasks.create_task(coroutine) for coroutine in work]

    async def warm(self, name: str, used: Collection[VersionKey] = ()) -> None:
        """Load what belongs on a shard that is new, as far as it has traffic or is `used`. Raises
        ShardUnavailable."""
        residency = self.residencies[name]
        for key in self._belonging(name, used)[: self._places]:
            try:
                # As used now, or what is loaded first would leave first where places are few.
                await residency.ensure(key, time.monotonic())
            except ShardUnavailable:
                raise
            except EngineError as error:  # the first request tries again
                logger.warning("%s: %s is not loaded again: %s", name, key, error)

    def open(self, name: str) -> None:
        """Send requests to this shard from now on, unless it is drained."""
        self.pool.join(self._joined[name], self._residents[name])
        if name not in self.pool.drained:  # one that is drained was not warmed
            self._lost.pop(name, None)

    def lose(self, name: str) -> None:
        """The core is gone, and what it had loaded."""
        self.pool.leave(name)
        residency = self.residencies.pop(name, None)
        if residency is None:
            return
        loaded = [version.key for version in residency.resident()]
        self._lost[name] = [*dict.fromkeys([*loaded, *self._lost.get(name, ())])]
        residency.lose()
        del self.slots[name]
        for run in self._runs.pop(name, ()):
            run.cancel()
        residents = self._residents.pop(name)
        residents.lose(name)
        if self._tasks is not None:
            self._tasks.create_task(residents.close())
        del self._joined[name]
        self._processes.drop_own(name)
        metrics.observe_resident(name, 0)
        metrics.observe_slot_waiting(name, 0)

    def order(self, key: VersionKey | None) -> tuple[str, ...]:
        """All shards, in the adapter's order; by name for the base model."""
        ring = self.pool.ring
        return ring.shards if key is None else ring.ranked(AdapterKey(key.tenant, key.adapter))

    def core(self, name: str) -> VllmShard | None:
        """The host's client of a shard's core; None if it does not run."""
        return self._joined.get(name)

    def has_traffic(self, key: VersionKey) -> bool:
        """Whether a traffic split has the version."""
        served = self._view.tenants.get(key.tenant, {}).get(key.adapter)
        return served is not None and any(arm.version == key.version for arm in served.split.arms)

    def _belonging(self, name: str, used: Collection[VersionKey]) -> list[VersionKey]:
        """What has traffic or is used, and is at home on that shard, of all that it or another one
        has or had: the others stood in for it."""
        ring = self.pool.ring.with_state(name, ShardState.UP)
        elsewhere = [version.key for loaded in self.resident.values() for version in loaded]
        return [
            key
            for key in dict.fromkeys([*self._lost.get(name, ()), *elsewhere])
            if name in ring.replicas(AdapterKey(key.tenant, key.adapter))
            and (key in used or self.has_traffic(key))
        ]

    def want(self, shard: str, key: VersionKey) -> None:
        """A worker waits for this version on the shard."""
        if (residency := self.residencies.get(shard)) is not None:
            residency.want(key)

    def are_slots_contended(self, name: str) -> bool:
        """Whether requests wait there because too many versions are in use."""
        slots = self.slots.get(name)
        return slots is not None and slots.are_contended

    def hear(self, message: WaitsForSlot | WentIdle) -> None:
        """What a worker says of slots."""
        if (slots := self.slots.get(message.shard)) is None:
            return
        match message:
            case WaitsForSlot(_, key, process, waits):
                slots.note_waiting(key, process, waits)
            case WentIdle():
                slots.look()

    def forget(self, process: int) -> None:
        """This worker died: nothing waits in it any more."""
        for slots in self.slots.values():
            slots.forget(process)

    async def close(self) -> None:
        """Stop waiting for what leaves. `run` has ended."""
        for residents in self._residents.values():
            await residents.close()
