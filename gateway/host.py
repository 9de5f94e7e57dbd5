"""The host: the control plane of one gateway. No token passes through it.

    state folder locked and swept, port held -> cores started -> control plane -> workers serve
    SIGTERM or SIGINT -> workers drain -> control plane closes -> cores stop -> exit 0

It starts and watches every other process, is the only writer of the database, and is itself
a client of each core.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
from collections.abc import Coroutine, Mapping
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from engine.base_model import ModelFingerprints, base_modules, fingerprints
from engine.core import ClientSlot, EngineOptions
from engine.errors import MAX_NAMES, CoreFailed
from engine.models import resolve_model
from engine.pool import ServedView
from engine.signals import tie_children
from gateway.call import Principal
from gateway.control import ControlPlane
from gateway.http_endpoint import HttpEndpoint
from gateway.keeper import ShardKeeper
from gateway.messages import Orders
from gateway.metrics import registry_commit
from gateway.pid_file import PidFile
from gateway.port import HeldPort, PortTaken
from gateway.settings import Settings
from gateway.shard_gauges import ShardGauges
from gateway.status_feed import StatusFeed
from gateway.status_reader import StatusReader
from gateway.supervisor import Supervisor
from gateway.training_gauges import TrainingGauges
from gateway.worker_process import WorkerProcess
from gateway.workers import WorkerFleet
from store.sqlite_jobs import SqliteJobs
from store.sqlite_registry import SqliteRegistry
from store.state_folder import StateFolder

logger = logging.getLogger(__name__)

REGISTRY_FILE = "registry.sqlite"
"""The one database, of adapters and of jobs."""
LATE_MESSAGES_S = 1.0
"""How long after a worker's death the core may still read messages that it had sent."""
CORE_DEATH_GRACE_S = 2.0
"""How long workers get to tell their clients that a core is gone."""


class Stopped(Exception):
    """A signal asked the gateway to end."""


class Host:
    """One gateway from start to exit. `run` owns all that it starts, and ends it."""

    def __init__(
        self, settings: Settings, run_dir: Path, training_environment: Mapping[str, str]
    ) -> None:
        """`run_dir` is a folder of this user's alone, with a short path, for the socket;
        `training_environment` is what training processes inherit."""
        self._settings = settings
        self._run_dir = run_dir
        self._training_environment = training_environment
        self._stop = asyncio.Event()
        self._watchers: list[asyncio.Task[None]] = []
        self._failure: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Fails with the error of the first watcher that fails; never succeeds."""
        self._owned = contextlib.AsyncExitStack()
        self._control: ControlPlane | None = None
        self._supervisor: Supervisor | None = None
        self._fleet: WorkerFleet | None = None

    async def run(self) -> int:
        """Serve until a signal ends it, which is exit code 0.

        Raises the typed error of whatever cannot start.
        """
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop.set)
        self._watch(self._stopped())
        async with self._owned:
            self._owned.push_async_callback(self._end_children)
            try:
                await self._serve()
            except CoreFailed:
                if self._fleet is not None:
                    await self._fleet.drain(0.0, CORE_DEATH_GRACE_S)
                raise
        return 0

    async def _serve(self) -> None:
        """From the start to the end of draining; what fails on the way comes through."""
        try:
            await self._unless_failed(self._start())
            await self._failure  # nothing else ends it
        except Stopped:
            self._failure = asyncio.get_running_loop().create_future()
            if self._fleet is not None:
                settings = self._settings
                logger.info("draining for at most %g s", settings.drain_grace_s)
                await self._unless_failed(
                    self._fleet.drain(settings.drain_delay_s, settings.drain_grace_s)
                )

    async def _start(self) -> None:
        """Everything up to SERVING, in the order in which it can fail cheaply."""
        settings = self._settings
        tie_children()
        state = self._owned.enter_context(StateFolder(settings.state_dir))
        pid_file = PidFile(state.path)
        await asyncio.to_thread(pid_file.sweep)
        port = HeldPort(settings.listen)
        self._owned.callback(port.close)
        reader = StatusReader(settings)
        feed = StatusFeed(reader.read)
        endpoint = _bind_http(settings, feed, reader)
        self._owned.push_async_callback(endpoint.close)
        self._owned.push_async_callback(feed.close)
        await endpoint.start()
        logger.info("status page: http://%s/", endpoint.address)

        model_path = await asyncio.to_thread(resolve_model, settings.model, state.path)
        prints = await asyncio.to_thread(fingerprints, model_path)
        commit = registry_commit.observe
        registry = SqliteRegistry(state.path / REGISTRY_FILE, observe_commit=commit)
        await self._owned.enter_async_context(registry)
        jobs = SqliteJobs(state.path / REGISTRY_FILE, observe_commit=commit)
        await self._owned.enter_async_context(jobs)

        # Workers import while adapters are checked and the core loads: all take seconds.
        self._fleet = fleet = WorkerFleet(
            settings.worker_count,
            lambda: self._orders(port.address, prints),
            lambda worker: self._after_death(worker, endpoint),
            lambda message: control.hear(message),
            pid_file.add,
            settings.worker_stall_timeout_s,
        )
        self._control = control = ControlPlane(
            settings,
            state.path,
            self._run_dir / "control.sock",
            registry,
            jobs,
            fleet,
            self._training_environment,
        )
        self._owned.push_async_callback(control.close)  # while the registry is open
        self._owned.push_async_callback(feed.close)  # while there is something to read
        reader.fleet, reader.control = fleet, control
        self._watch(fleet.run())
        await control.open()

        modules = await asyncio.to_thread(base_modules, model_path)
        names = settings.shard_names
        options = [_engine_options(settings, model_path, number) for number in range(len(names))]
        config = await asyncio.to_thread(options[0].build_config)
        dtype = str(config.model_config.dtype).removeprefix("torch.")
        control.check_for(model_path, modules, prints, dtype)
        for adapter, folder in settings.adapter.items():
            await control.check(adapter, folder)  # before minutes are spent on the cores

        keepers = [
            ShardKeeper(
                name,
                options[number],
                partial(settings.environment_of, number),
                settings.engine_stall_timeout_s,
                self._run_dir,
                control.crashes.screening,
                started=pid_file.add,
            )
            for number, name in enumerate(names)
        ]
        # On a CPU nothing is compiled: see `prepare_environment`.
        self._supervisor = supervisor = Supervisor(keepers, compiles=bool(settings.gpus(0)))
        reader.supervisor = supervisor
        await supervisor.start(config)
        endpoint.add(ShardGauges(settings.model, lambda: supervisor.shards))
        endpoint.add(TrainingGauges(control.training_pulse))
        endpoint.add(control.crashes)
        control.serve_on(supervisor.shards, supervisor.keepers)
        self._watch(control.run())
        self._watch(supervisor.keep(control))
        for adapter, folder in settings.adapter.items():
            await control.adopt(adapter, folder)
        await control.serve()

        fleet.open()
        await fleet.wait_serving()
        supervisor.settle()
        print(
            f"lora-gateway SERVING on {port.address}: {settings.model}, "
            f"adapters: {_adapter_names(control.view)}; metrics http://{endpoint.address}/metrics",
            flush=True,
        )

    def _orders(self, listen: str, prints: ModelFingerprints) -> Orders:
        """What a new worker needs, with a fresh slot on each core."""
        assert self._supervisor is not None and self._control is not None
        control = self._control
        return Orders(
            slots=self._supervisor.take_slots(),
            shards=self._settings.shard_names,
            model=self._supervisor.model,
            listen=listen,
            control_address=control.address,
            settings=self._settings,
            fingerprints=prints,
            view=control.view,
            resident=control.resident,
            granted=control.granted,
            plan=control.plan,
            named=control.named,
            drained=control.drained,
            quarantined=control.crashes.state,
            lent=control.lent,
        )

    async def _after_death(self, worker: WorkerProcess, endpoint: HttpEndpoint) -> None:
        """Clean up after a worker that died: nobody reads what it left in the core."""
        endpoint.forget_process(worker.pid)
        if self._control is not None:
            self._control.forget_worker(worker.pid)
        for slot in worker.slots:
            try:
                aborted = await self._abort_client(slot)
                await asyncio.sleep(LATE_MESSAGES_S)
                aborted += await self._abort_client(slot)
            except Exception as error:  # costs decoding for nobody, and nothing else
                logger.error("could not abort what worker %d left: %r", worker.pid, error)
            else:
                logger.info("aborted %d requests of worker %d", aborted, worker.pid)

    async def _abort_client(self, slot: ClientSlot) -> int:
        assert self._supervisor is not None
        return await self._supervisor.abort_client(slot)

    async def _end_children(self) -> None:
        """End every process that is left: the cores in order, whatever else at once."""
        for watcher in self._watchers:
            watcher.cancel()
        if self._fleet is not None:
            self._fleet.kill()
        if self._supervisor is not None:
            await self._supervisor.stop()
        await asyncio.gather(*self._watchers, return_exceptions=True)

    def _watch(self, work: Coroutine[Any, Any, None]) -> None:
        """Run `work` beside everything else; if it fails, the gateway does."""
        task = asyncio.create_task(work)
        self._watchers.append(task)
        task.add_done_callback(self._note_failure)

    def _note_failure(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) and not self._failure.done():
            self._failure.set_exception(error)

    async def _unless_failed(self, work: Coroutine[Any, Any, None]) -> None:
        """Do `work`; if a watcher fails meanwhile, give it up and raise the watcher's error."""
        task = asyncio.create_task(work)
        await asyncio.wait((task, self._failure), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            task.cancel()
            await asyncio.wait((task,))
            await self._failure
        await task

    async def _stopped(self) -> None:
        await self._stop.wait()
        raise Stopped


def _adapter_names(view: ServedView) -> str:
    """Those that a caller may name, for the line that says SERVING."""
    adapters = view.tenants.get(Principal().tenant, {})
    names = [
        f"{name}@{'/'.join(str(arm.version) for arm in served.split.arms)}"
        for name, served in islice(adapters.items(), MAX_NAMES)
        if served.split.arms
    ]
    more = len(adapters) - MAX_NAMES
    return (", ".join(names) or "none") + (f" and {more} more" if more > 0 else "")


def _engine_options(settings: Settings, model_path: Path, shard: int) -> EngineOptions:
    return EngineOptions(
        model_path=model_path,
        served_model_name=settings.model,
        dtype=settings.dtype,
        quantization=settings.quantization,
        max_model_len=settings.max_model_len,
        max_num_seqs=settings.max_num_seqs,
        gpu_memory_utilization=settings.gpu_memory_utilization,
        max_loras=settings.max_loras,
        max_cpu_loras=settings.max_cpu_loras,
        max_lora_rank=int(settings.max_lora_rank),
        adapter_loader=settings.adapter_loader,
        otlp_endpoint=settings.otlp_endpoint,
        devices=settings.devices_per_shard,
        sleeps=settings.lends and bool(settings.gpus(shard)),
    )


def _bind_http(settings: Settings, feed: StatusFeed, reader: StatusReader) -> HttpEndpoint:
    try:
        return HttpEndpoint(settings.metrics_listen, feed, reader.phase)
    except OSError as error:
        raise PortTaken(settings.metrics_listen, error, "--metrics-listen") from None
