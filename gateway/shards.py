"""The shards as the host holds them: what each has loaded, and who is up.

    core runs -> join: residency and residents -> open: the ring places requests on it

Owned by the control plane.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

from engine.generation import ServedVersion, VersionKey
from engine.pool import ServedView, ShardPool
from engine.residency import Residency, Versions
from engine.residents import Residents
from engine.shard import VllmShard
from gateway import metrics
from gateway.processes import Processes


class Shards:
    """All shards of one gateway, for the host's own requests and for those who load."""

    def __init__(
        self,
        names: Sequence[str],
        places: int,
        versions: Versions,
        processes: Processes,
        view: ServedView,
    ) -> None:
        """`names` are those of all shards; each has so many `places` for adapters."""
        self.pool = ShardPool((), {}, view, names)
        self.residencies: dict[str, Residency] = {}
        """Of the shards whose cores run."""
        self._residents: dict[str, Residents] = {}
        self._places = places
        self._versions = versions
        self._processes = processes
        self._tasks: asyncio.TaskGroup | None = None

    @property
    def resident(self) -> Mapping[str, Sequence[ServedVersion]]:
        """What each shard has loaded now."""
        return {name: residency.resident() for name, residency in self.residencies.items()}

    async def run(self) -> None:
        """Load what is wanted, until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            self._tasks = tasks
            for residency in self.residencies.values():
                tasks.create_task(residency.run())
            await asyncio.Event().wait()

    def join(self, shard: VllmShard) -> None:
        """Load adapters on this shard when they are wanted there."""
        residency = Residency(
            shard,
            self._places,
            self._versions,
            self._processes,
            metrics.observe_load,
            metrics.observe_resident,
        )
        metrics.observe_resident(shard.name, 0)
        residents = Residents(residency.want, shard.requests_of)
        self._processes.add_own(shard.name, residents)
        self.residencies[shard.name] = residency
        self._residents[shard.name] = residents
        if self._tasks is not None:
            self._tasks.create_task(residency.run())
        self.pool.join(shard, residents)

    def want(self, shard: str, key: VersionKey) -> None:
        """A worker waits for this version on the shard."""
        if (residency := self.residencies.get(shard)) is not None:
            residency.want(key)

    async def close(self) -> None:
        """Stop waiting for what leaves. `run` has ended."""
        for residents in self._residents.values():
            await residents.close()
