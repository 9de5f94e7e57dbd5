"""The control plane: what the host knows of adapters, jobs and shards, and what it answers.

    worker --Unix socket--> Adapters -> adapter plane -> residency -> shards
                       |--> Training -> training plane ----^            ^
                       '--> Admin ----------------------> drains -------'

Owned by the host. It puts the parts together, and ends them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import grpc

from engine.base_model import BaseModules, ModelFingerprints
from engine.core import ClientSlot
from engine.core_death import CoreDeath
from engine.generation import ServedVersion, VersionKey
from engine.pool import ServedView
from engine.replication import Planner
from engine.ring import AdapterKey, Plan
from engine.servability import trainable_modules
from engine.shard import VllmShard
from gateway import adapters, admin, training
from gateway.adapter_plane import AdapterPlane
from gateway.admin import Admin
from gateway.admission import MAX_WATCHES, Admission, Draining, Slots
from gateway.crashes import Crashes
from gateway.drains import Drains
from gateway.keeper import ShardKeeper
from gateway.lending import Lending
from gateway.lending_terms import Terms, lender_of
from gateway.messages import Acquitted, Ended, Unasked, Used, WaitsForSlot, Want, WentIdle
from gateway.naming import Naming
from gateway.planning import Planning
from gateway.processes import Processes
from gateway.relay import caller
from gateway.renewal import Renewal
from gateway.server import HOST_OPTIONS, HOST_SERVICES
from gateway.settings import Settings
from gateway.shard_survey import ShardSurvey
from gateway.shards import Shards
from gateway.sights import Sights
from gateway.throughput import Throughput
from gateway.tracing import Tracing
from gateway.training_plane import TrainingPlane
from gateway.upload_sweep import UploadSweep
from gateway.workers import WorkerFleet
from gateway.wrap import Edge, EdgeInterceptor
from lora_gateway.v1.adapters_pb2_grpc import add_AdaptersServicer_to_server
from lora_gateway.v1.admin_pb2_grpc import add_AdminServicer_to_server
from lora_gateway.v1.training_pb2_grpc import add_TrainingServicer_to_server
from store.jobs import JobStore
from store.registry import Registry
from trainer.pulse import Pulse
from trainer.served import ServedModel

MAX_STREAMS = 256
"""Evaluations, reports, previews, estimates, publications and logs at once: each works, or reads
files, in a thread."""


class ControlPlane:
    """Everything about adapters in one gateway. `open`, `serve_on`, `serve`; at last `close`."""

    def __init__(
        self,
        settings: Settings,
        state_dir: Path,
        socket_path: Path,
        registry: Registry,
        jobs: JobStore,
        fleet: WorkerFleet,
        training_environment: Mapping[str, str],
    ) -> None:
        self.address = f"unix:{socket_path}"
        """Where workers reach it, as gRPC names it."""
        self._settings = settings
        self._registry = registry
        self._processes = processes = Processes(fleet)
        self._planner = Planner(settings.max_cpu_loras)
        self._naming = naming = Naming(self._planner.shares, processes, fleet)
        self._throughput = Throughput()
        self.crashes = Crashes()
        self._admission = Admission(MAX_STREAMS)
        self._watches = Slots(MAX_WATCHES, "watches")
        self._tracing = Tracing(settings.otlp_endpoint)
        self._adapters = AdapterPlane(
            *(settings, state_dir, registry, naming, processes, self.crashes.holds)
        )
        self._training = TrainingPlane(settings, state_dir, jobs, training_environment)
        self._upload_sweep = UploadSweep(
            self._adapters.uploads, registry, self._training.sweep_uploads
        )
        self._served: ServedModel | None = None
        self._modules = BaseModules({})
        self._shards: Shards | None = None
        self._planning: Planning | None = None
        self._renewal: Renewal | None = None
        self._lending: Lending | None = None
        self._server: grpc.aio.Server | None = None
        self._running: asyncio.Task[Any] | None = None

    async def open(self) -> None:
        """Read what is registered."""
        await self._adapters.open()
        await self._training.open()

    @property
    def view(self) -> ServedView:
        """What may be asked for now."""
        return self._adapters.view

    @property
    def resident(self) -> Mapping[str, Sequence[ServedVersion]]:
        """What each shard has loaded now."""
        assert self._shards is not None
        return self._shards.resident

    @property
    def granted(self) -> Mapping[str, Sequence[VersionKey]]:
        """Which versions have slots of each shard now."""
        assert self._shards is not None
        return self._shards.granted

    def forget_worker(self, pid: int) -> None:
        """This worker died: nothing waits in it any more."""
        if self._shards is not None:
            self._shards.forget(pid)

    @property
    def plan(self) -> Plan:
        """How many replicas hot adapters have."""
        assert self._planning is not None
        return self._planning.plan

    @property
    def named(self) -> frozenset[AdapterKey]:
        """The adapters that have series of their own."""
        return self._naming.named

    async def training_pulse(self) -> Pulse:
        """How many jobs there are, and how their processes do."""
        return await self._training.pulse()

    @property
    def sights(self) -> Sights:
        """What the status page shows of it."""
        return Sights(
            *(self._adapters.ledger, self._registry, self._training.store, self._adapters.arms),
            *(self._throughput, self._processes, self._shards, self._training.queue_position),
        )

    @property
    def drained(self) -> frozenset[str]:
        """Shards that take no requests, whether they are up or not."""
        assert self._shards is not None
        return self._shards.pool.drained

    @property
    def lent(self) -> frozenset[str]:
        """Shards that are lent to training, or about to be."""
        assert self._shards is not None
        return self._shards.pool.lent

    def hear(self, message: Unasked) -> None:
        """What a worker says unasked."""
        assert self._shards is not None and self._planning is not None
        match message:
            case Want(shard, key):
                self._shards.want(shard, key)
            case WaitsForSlot() | WentIdle():
                self._shards.hear(message)
            case Ended(outcomes):
                self._adapters.arms.record(outcomes)
            case Used(tokens):
                self._planning.record(tokens)
                self._throughput.record(tokens)
            case Acquitted(fingerprint):
                self.crashes.acquit(fingerprint)

    def check_for(
        self, model_path: Path, modules: BaseModules, prints: ModelFingerprints, dtype: str
    ) -> None:
        """Take in adapters for this base model, which computes in `dtype`."""
        settings = self._settings
        self._modules = modules
        self._served = ServedModel(
            name=settings.model,
            path=model_path,
            fingerprints=asdict(prints),
            dtype=dtype,
            max_model_len=settings.max_model_len,
            max_lora_rank=int(settings.max_lora_rank),
            target_modules=trainable_modules(modules.linear),
        )
        checkpoint = self._training.sources.adapter
        self._adapters.check_for(modules.shapes, prints, dtype, checkpoint)

    async def check(self, adapter: str, folder: Path) -> None:
        """Check the adapter in a folder of the operator's. Raises AdapterInvalid."""
        await self._adapters.check(adapter, folder)

    def lose(self, shard: str, death: CoreDeath) -> None:
        """The core is dead: nobody uses it any more, and whoever waits for it is told."""
        quarantined = self.crashes.judge(shard, death)
        if self._shards is not None:
            self._shards.lose(shard)
        self._processes.lose(shard, death.crashed, quarantined)

    async def prepare(self, shard: VllmShard) -> None:
        """Load what belongs on a new core, which nobody uses yet. Raises ShardUnavailable."""
        assert self._shards is not None
        self._shards.join(shard)
        if shard.name not in self.drained:  # else once it is resumed
            await self._shards.warm(shard.name)

    async def admit(self, shard: str, take_slot: Callable[[], ClientSlot]) -> None:
        """Have all use the shard from now on, and go on with what it left undone."""
        assert self._shards is not None
        self._shards.open(shard)
        resident, granted = self._shards.resident[shard], self._shards.granted[shard]
        await self._processes.admit(shard, resident, granted, take_slot)
        await self._adapters.catalog.go_on()

    def serve_on(self, shards: Iterable[VllmShard], keepers: Sequence[ShardKeeper]) -> None:
        """Load, probe and evaluate on these shards, which have these keepers. Call `run` from now
        on."""
        assert self._served is not None
        served, settings, processes = self._served, self._settings, self._processes
        catalog, ledger = self._adapters.catalog, self._adapters.ledger
        self._shards = ours = Shards(
            *(settings.shard_names, settings.max_cpu_loras, settings.max_loras),
            *(catalog, processes, self.view),
        )
        pool = ours.pool
        self._planning = Planning(self._planner, ours, catalog, ledger, processes)
        drains = Drains(ours, processes)
        self._renewal = Renewal(keepers, drains, processes)
        self._lending = Lending(
            *(keepers, drains, pool, Terms.of(settings), partial(lender_of, settings))
        )
        adapters_servicer = self._adapters.serve(
            ours, self._training.trials(served), self._admission, self._watches
        )
        training_servicer = self._training.serve(
            *(served, self._modules.linear, lambda: pool.route_to(None).shard, catalog),
            *(self._registry, self._admission, self._watches, self._lending),
        )
        for shard in shards:
            ours.join(shard)
            ours.open(shard.name)
        survey = ShardSurvey(keepers, ours, drains, processes, settings.max_cpu_loras)
        admin_servicer = Admin(survey, drains, ours, processes, self.view, self.crashes)
        self._server = server = self._build_server()
        add_AdaptersServicer_to_server(adapters_servicer, server)
        add_TrainingServicer_to_server(training_servicer, server)
        add_AdminServicer_to_server(admin_servicer, server)

    async def run(self) -> None:
        """Load what is wanted, watch what is guarded, sweep what is left, until closed."""
        assert self._shards is not None and self._planning is not None
        assert self._renewal is not None and self._lending is not None
        self._running = asyncio.current_task()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._shards.run())
            if self._settings.shards > 1:
                tasks.create_task(self._planning.run())
            tasks.create_task(self._naming.run())
            tasks.create_task(self._renewal.run())
            if self._settings.lends:
                tasks.create_task(self._lending.run())
            tasks.create_task(self._adapters.guard())
            tasks.create_task(self._upload_sweep.run())
            tasks.create_task(self._training.run())

    async def adopt(self, adapter: str, folder: Path) -> None:
        """Have the adapter in a folder of the operator's as a version, loaded. Raises
        AdapterInvalid."""
        await self._adapters.adopt(adapter, folder)

    async def serve(self) -> None:
        """Answer workers, and go on with what the last process left undone."""
        assert self._server is not None
        self._server.add_insecure_port(self.address)
        await self._server.start()
        await self._adapters.catalog.resume()

    async def close(self) -> None:
        """End everything, in an order in which nothing is lost that was acknowledged."""
        self._admission.close(Draining())
        self._admission.cut_all(Draining())
        if self._server is not None:
            await self._server.stop(1.0)
        if self._running is not None:
            # First: a load takes a minute where the core does not answer.
            self._running.cancel()
            await asyncio.wait((self._running,))
        await self._training.close()
        await self._adapters.close()
        if self._shards is not None:
            await self._shards.close()
        await asyncio.to_thread(self._tracing.close)

    def _build_server(self) -> grpc.aio.Server:
        settings = self._settings
        edge = Edge(
            self._admission,
            self._tracing,
            settings.default_unary_deadline_s,
            settings.default_stream_deadline_s,
            # A call is counted where it came in, by the worker that passed it on.
            lambda call, code, end_s: None,
            caller,
            adapters.PATIENT_METHODS | training.PATIENT_METHODS | admin.PATIENT_METHODS,
        )
        return grpc.aio.server(
            interceptors=[EdgeInterceptor(edge, HOST_SERVICES)], options=list(HOST_OPTIONS)
        )
