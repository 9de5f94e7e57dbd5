"""Reads the status of a gateway from what the host holds, from the first second of a start on."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from importlib.metadata import version

from gateway.adapter_sight import read_adapters
from gateway.call import Principal
from gateway.control import ControlPlane
from gateway.event_sight import EventSight
from gateway.job_sight import JobSight
from gateway.keeper import ShardKeeper
from gateway.keeper_state import KeeperState
from gateway.note import Note
from gateway.settings import Settings
from gateway.shard_sight import ShardSight
from gateway.status import Phase, ShardStatus, Status
from gateway.supervisor import Supervisor
from gateway.throughput import INTERVAL_S
from gateway.words import for_people
from gateway.worker_process import WorkerState
from gateway.workers import WorkerFleet


class StatusReader:
    """The host sets its parts here as it starts them."""

    def __init__(self, settings: Settings) -> None:
        self.fleet: WorkerFleet | None = None
        self.supervisor: Supervisor | None = None
        self.control: ControlPlane | None = None
        self._settings = settings
        self._version = version("lora-gateway")
        self._start_time_s = time.time()
        self._shards = ShardSight()
        self._jobs = JobSight()
        self._events = EventSight()

    def phase(self) -> Phase:
        """Where the gateway stands now. Asks nobody."""
        fleet = self.fleet
        if fleet is not None and fleet.draining:
            return Phase.DRAINING
        if fleet is None or not fleet.numbers.get(WorkerState.SERVING):
            return Phase.STARTING
        sights = None if self.control is None else self.control.sights
        is_open = sights is not None and sights.shards is not None and sights.shards.pool.is_open
        return Phase.SERVING if is_open else Phase.UNAVAILABLE

    async def read(self) -> Status:
        """The gateway as it is now. Asks cores and workers, and reads the store."""
        keepers, tenant = self._keepers(), Principal().tenant
        sights = None if self.control is None else self.control.sights
        registry = None if sights is None else sights.registry
        jobs, active = ([], 0) if sights is None else await self._jobs.read(sights, tenant)
        numbers = {} if self.fleet is None else self.fleet.numbers
        return Status(
            phase=self.phase(),
            model=for_people(self._settings.model),
            version=self._version,
            start_time_s=self._start_time_s,
            workers_wanted=self._settings.worker_count,
            workers={state.value: number for state, number in numbers.items() if number},
            tokens_per_s=[] if sights is None else sights.throughput.per_s(),
            interval_s=INTERVAL_S,
            shards=await self._shards.read(keepers, sights) or self._to_come(),
            adapters=[] if sights is None else read_adapters(sights, tenant),
            adapter_count=0 if sights is None else len(sights.ledger.view.tenants.get(tenant, {})),
            jobs=jobs,
            active_job_count=active,
            events=await self._events.read(registry, tenant, self._notes()),
        )

    def _notes(self) -> dict[str, Iterable[Note]]:
        """What was noted of each shard, and of the workers."""
        notes: dict[str, Iterable[Note]] = {keeper.name: keeper.notes for keeper in self._keepers()}
        return notes if self.fleet is None else notes | {"workers": self.fleet.notes}

    def _keepers(self) -> Sequence[ShardKeeper]:
        return [] if self.supervisor is None else list(self.supervisor.keepers)

    def _to_come(self) -> list[ShardStatus]:
        """Shards of which nothing runs yet."""
        return [
            ShardStatus(
                name=name,
                state=KeeperState.STARTING.value,
                since_s=self._start_time_s,
                reason="",
                restarts=0,
                answers=False,
                running=0,
                waiting=0,
                deferred=0,
                kv_cache_usage=0.0,
                slots_left=0,
                batch_slots=0,
                turns=(),
                turns_held=0,
                turns_waiting=0,
                places=0,
                resident_count=0,
                residents=(),
            )
            for name in self._settings.shard_names
        ]
