"""The control plane: what the host knows of adapters, and the services that it answers.

    worker --Unix socket--> Adapters -> catalog -> ledger -> registry
                       '--> Training ---^  |          '----> view, to all processes
                                           '-> residency -> shards

Owned by the host. It puts the parts together, and ends them.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import grpc

from engine.base_model import BaseModules, ModelFingerprints
from engine.catalog import AdapterCatalog
from engine.core import ClientSlot
from engine.core_death import CoreDeath
from engine.generation import ServedVersion, VersionKey
from engine.intake import Intake
from engine.ledger import Ledger
from engine.pool import ServedView
from engine.probe import Probe
from engine.replication import Planner
from engine.ring import AdapterKey, Plan
from engine.servability import trainable_modules
from engine.shard import VllmShard
from gateway import adapters, admin, training
from gateway.adapters import Adapters
from gateway.admin import Admin
from gateway.admission import MAX_WATCHES, Admission, Draining, Slots
from gateway.arms import Arms
from gateway.call import Principal
from gateway.channel import Acquitted, Ended, Unasked, Used, WaitsForSlot, Want, WentIdle
from gateway.checkpoint_sources import TRAIN_SCHEME
from gateway.crashes import Crashes
from gateway.drains import Drains
from gateway.evaluation import Evaluations
from gateway.judgement import Judgement
from gateway.keeper import ShardKeeper
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
from gateway.training import Training
from gateway.training_plane import TrainingPlane
from gateway.upload_sweep import UploadSweep
from gateway.workers import WorkerFleet
from gateway.wrap import Edge, EdgeInterceptor
from lora_gateway.v1.adapters_pb2_grpc import add_AdaptersServicer_to_server
from lora_gateway.v1.admin_pb2_grpc import add_AdminServicer_to_server
from lora_gateway.v1.training_pb2_grpc import add_TrainingServicer_to_server
from store.artifacts import ArtifactStore
from store.jobs import JobStore
from store.registry import Registry
from store.sources import AllowedSources
from store.uploads import UploadStore
from trainer.pulse import Pulse
from trainer.served import ServedModel

logger = logging.getLogger(__name__)

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
        self._store = ArtifactStore(state_dir)
        self._uploads = UploadStore(state_dir)
        self._sources = AllowedSources(settings.adapter_source_allow)
        self._processes = Processes(fleet)
        self._planner = Planner(settings.max_cpu_loras)
        self._naming = Naming(self._planner.shares, self._processes, fleet)
        self._ledger = Ledger(registry, self._naming)
        self._arms = Arms()
        self._throughput = Throughput()
        self.crashes = Crashes()
        self._judgement = Judgement(
            registry, self._ledger, self._arms, self._processes, self.crashes.holds
        )
        self._admission = Admission(MAX_STREAMS)
        self._watches = Slots(MAX_WATCHES, "watches")
        self._tracing = Tracing(settings.otlp_endpoint)
        self._training = TrainingPlane(settings, state_dir, jobs, training_environment)
        self._upload_sweep = UploadSweep(self._uploads, registry, self._training.sweep_uploads)
        self._served: ServedModel | None = None
        self._modules = BaseModules({})
        self._shards: Shards | None = None
        self._planning: Planning | None = None
        self._renewal: Renewal | None = None
        self._catalog: AdapterCatalog | None = None
        self._intake: Intake | None = None
        self._server: grpc.aio.Server | None = None
        self._running: asyncio.Task[Any] | None = None

    async def open(self) -> None:
        """Read what is registered."""
        await self._ledger.open()
        self._naming.open(self._ledger.view)
        await self._training.open()

    @property
    def view(self) -> ServedView:
        """What may be asked for now."""
        return self._ledger.view

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
            *(self._ledger, self._registry, self._training.store, self._arms),
            *(self._throughput, self._processes, self._shards, self._training.queue_position),
        )

    @property
    def drained(self) -> frozenset[str]:
        """Shards that take no requests, whether they are up or not."""
        assert self._shards is not None
        return self._shards.pool.drained

    def hear(self, message: Unasked) -> None:
        """What a worker says unasked."""
        assert self._shards is not None and self._planning is not None
        match message:
            case Want(shard, key):
                self._shards.want(shard, key)
            case WaitsForSlot() | WentIdle():
                self._shards.hear(message)
            case Ended(outcomes):
                self._arms.record(outcomes)
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
        self._intake = Intake(
            self._store,
            self._uploads,
            self._sources,
            modules.shapes,
            prints,
            max_lora_rank=int(settings.max_lora_rank),
            dtype=dtype,
            folders={TRAIN_SCHEME: self._training.sources.adapter},
        )
        self._catalog = AdapterCatalog(
            self._ledger, self._registry, self._store, self._uploads, self._intake
        )

    async def check(self, adapter: str, folder: Path) -> None:
        """Check the adapter in a folder of the operator's. Raises AdapterInvalid."""
        assert self._intake is not None
        async with self._intake.inspect_folder(adapter, folder):
            pass

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
        assert self._shards is not None and self._catalog is not None
        self._shards.open(shard)
        resident, granted = self._shards.resident[shard], self._shards.granted[shard]
        await self._processes.admit(shard, resident, granted, take_slot)
        await self._catalog.go_on()

    def serve_on(self, shards: Iterable[VllmShard], keepers: Sequence[ShardKeeper]) -> None:
        """Load, probe and evaluate on these shards, which have these keepers. Call `run` from now
        on."""
        assert self._catalog is not None and self._served is not None
        catalog, served, settings = self._catalog, self._served, self._settings
        self._shards = ours = Shards(
            *(settings.shard_names, settings.max_cpu_loras, settings.max_loras),
            *(catalog, self._processes, self.view),
        )
        pool = ours.pool
        self._planning = Planning(self._planner, ours, catalog, self._ledger, self._processes)
        catalog.serve_on(ours.residencies, pool, Probe(), self._training.trials(served))
        evaluations = Evaluations(self._registry, self._sources, ours, settings.max_num_seqs)
        servicer = self._training.serve(
            *(served, self._modules.linear, lambda: pool.route_to(None).shard, catalog),
            *(self._registry, self._admission, self._watches),
        )
        for shard in shards:
            ours.join(shard)
            ours.open(shard.name)
        self._server = self._build_server(catalog, evaluations, servicer)
        drains = Drains(ours, self._processes)
        self._renewal = Renewal(keepers, drains, self._processes)
        places = settings.max_cpu_loras
        survey = ShardSurvey(keepers, ours, drains, self._processes, places)
        add_AdminServicer_to_server(
            Admin(survey, drains, ours, self._processes, self.view, self.crashes), self._server
        )

    async def run(self) -> None:
        """Load what is wanted, watch what is guarded, sweep what is left, until closed."""
        assert self._shards is not None and self._planning is not None
        assert self._renewal is not None
        self._running = asyncio.current_task()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._shards.run())
            if self._settings.shards > 1:
                tasks.create_task(self._planning.run())
            tasks.create_task(self._naming.run())
            tasks.create_task(self._renewal.run())
            tasks.create_task(self._judgement.guard())
            tasks.create_task(self._upload_sweep.run())
            tasks.create_task(self._training.run())

    async def adopt(self, adapter: str, folder: Path) -> None:
        """Have the adapter in a folder of the operator's as a version, loaded. Raises
        AdapterInvalid."""
        assert self._catalog is not None
        tenant = Principal().tenant
        record = await self._catalog.adopt(tenant, adapter, folder)
        await self._catalog.load(VersionKey(tenant, adapter, record.version))
        arms = (await self._registry.adapter(tenant, adapter)).arms
        if all(arm.version != record.version for arm in arms):
            logger.warning(
                "adapter %s version %d is READY and has no traffic; to give it all: "
                "gateway adapters promote %s %d",
                *(adapter, record.version, adapter, record.version),
            )

    async def serve(self) -> None:
        """Answer workers, and go on with what the last process left undone."""
        assert self._server is not None and self._catalog is not None
        self._server.add_insecure_port(self.address)
        await self._server.start()
        await self._catalog.resume()

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
        if self._catalog is not None:
            await self._catalog.close()
        await self._ledger.close()
        if self._shards is not None:
            await self._shards.close()
        await asyncio.to_thread(self._tracing.close)

    def _build_server(
        self, catalog: AdapterCatalog, evaluations: Evaluations, training_servicer: Training
    ) -> grpc.aio.Server:
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
        server = grpc.aio.server(
            interceptors=[EdgeInterceptor(edge, HOST_SERVICES)], options=list(HOST_OPTIONS)
        )
        servicer = Adapters(
            catalog,
            self._ledger,
            self._registry,
            self._uploads,
            self._judgement,
            evaluations,
            self._admission,
            self._watches,
        )
        add_AdaptersServicer_to_server(servicer, server)
        add_TrainingServicer_to_server(training_servicer, server)
        return server
