"""Jobs with all that is around them: the real store, scripted training processes, a publisher."""

from __future__ import annotations

import asyncio
import hashlib
import os
import sys
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from store.datasets import DatasetFiles
from store.job_records import DatasetRecord, EventKind, JobEventRecord, JobRecord, JobState
from store.records import VersionUnknown
from store.sqlite_jobs import SqliteJobs
from tests.trainer.scripted_worker import Script
from tests.trainer.small_adapter import MODULES, write_small_adapter
from trainer.devices import CPU, Device
from trainer.estimate import Price
from trainer.events import Publication, PublicationState
from trainer.jobs import Jobs
from trainer.lender import Lender
from trainer.library import LibraryVersion
from trainer.preparation import Prepared
from trainer.process import kill_all, members
from trainer.publisher import Finding
from trainer.report import DatasetReport, TokenStatistics
from trainer.run_folder import RunFolder
from trainer.served import ServedModel
from trainer.spec import DataSpec, Hyperparameters, JobSpec, PublishSpec

WORKER = Path(__file__).with_name("scripted_worker.py")
TENANT = "acme"
SOON_S = 90.0
"""Far more than it takes, also on a machine that has eight times as much to do as it can."""
LINE = '{"prompt": "a", "completion": "b"}\n'


@dataclass
class CountingPreparations:
    """Takes a line for a row, and only what begins with a brace for a good one."""

    root: Path
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    """Set: it may go on."""
    waiting: int = 0
    prepared: list[str] = field(default_factory=list)

    async def prepare(self, dataset: DatasetRecord, path: Path, data: DataSpec) -> Prepared:
        self.waiting += 1
        try:
            await self.gate.wait()
        finally:
            self.waiting -= 1
        self.prepared.append(dataset.name)
        lines = _lines(path)
        bad = sum(not line.startswith("{") for line in lines)
        rows = len(lines) - bad
        report = DatasetReport(
            valid=bad == 0,
            reasons=() if bad == 0 else (f"{bad} of {len(lines)} lines are bad: correct them",),
            total_lines=len(lines),
            bad_lines=bad,
            rows=rows,
            tokens=TokenStatistics(total=10 * rows, trained=5 * rows, mean=10.0, p95=12, max=12),
        )
        return _prepared(dataset.name, self.root, report)


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines()


def _prepared(dataset: str, root: Path, report: DatasetReport) -> Prepared:
    return Prepared(folder=root / "prepared", report=report, dataset=dataset)


@dataclass
class ScriptedPublisher:
    """Publishes as it is told."""

    state: PublicationState = PublicationState.SERVING
    error: Exception | None = None
    unservable: Sequence[Finding] = ()
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    """Set: it may go on."""
    published: list[tuple[str, Path, str, PublishSpec]] = field(default_factory=list)
    cancelled: int = 0
    stubborn: bool = False
    """It is through with it when the job is cancelled."""

    def findings(self, spec: JobSpec) -> Sequence[Finding]:
        return self.unservable

    async def publish(
        self, job: JobRecord, checkpoint: Path, adapter: str, publish: PublishSpec
    ) -> Publication:
        self.published.append((job.name, checkpoint, adapter, publish))
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            if not self.stubborn:
                raise
        if self.error is not None:
            raise self.error
        serving = self.state is PublicationState.SERVING
        return Publication(
            state=self.state,
            adapter=adapter,
            version=1 if serving else 0,
            reasons=() if serving else ("it is what the script says",),
            traffic_percent=publish.traffic_percent if serving else 0,
        )


@dataclass
class ScriptedLibrary:
    """Has the versions that a test puts in."""

    root: Path
    versions: dict[tuple[str, str, int], LibraryVersion] = field(default_factory=dict)
    modules: Mapping[str, tuple[int, int]] = field(default_factory=lambda: MODULES)
    most_asked: int = 1

    async def version(self, tenant: str, adapter: str, version: int | None) -> LibraryVersion:
        number = self.most_asked if version is None else version
        found = self.versions.get((tenant, adapter, number))
        if found is None:
            raise VersionUnknown(adapter, number)
        return found

    def put(
        self,
        adapter: str = "pirate",
        version: int = 1,
        *,
        tenant: str = TENANT,
        fingerprints: Mapping[str, str] = {},
        targets: Sequence[str] = ("q_proj", "v_proj"),
        rank: int = 8,
        **config: object,
    ) -> LibraryVersion:
        """A version, whose weights are all its number."""
        folder = self.root / "library" / tenant / adapter / f"{version}"
        write_small_adapter(folder, targets, rank, seed=version, **config)
        weights = folder / "adapter_model.safetensors"
        digest = hashlib.sha256(weights.read_bytes()).hexdigest()
        found = LibraryVersion(
            version, folder / "adapter_config.json", weights, digest, fingerprints
        )
        self.versions[tenant, adapter, version] = found
        return found


@dataclass
class Stage:
    """Jobs that run."""

    root: Path
    store: SqliteJobs
    datasets: DatasetFiles
    preparations: CountingPreparations
    publisher: ScriptedPublisher
    library: ScriptedLibrary
    devices: Sequence[Device] = (Device(CPU),)
    max_active: int = 1000
    price: Price | None = None
    environment: dict[str, str] = field(default_factory=lambda: {"PATH": os.defpath})
    grace_s: float = 10.0
    stall_timeout_s: float = 300.0
    served: ServedModel | None = None
    """What is served; None: the tiny model."""
    lender: Lender | None = None
    _task: asyncio.Task[None] | None = None

    def __post_init__(self) -> None:
        self.jobs = self._make()

    def _make(self) -> Jobs:
        return Jobs(
            self.store,
            self.datasets,
            self.preparations,
            self.publisher,
            self.served or served(self.root),
            self.devices,
            self.root,
            library=self.library,
            python=sys.executable,
            environment=self.environment,
            price=self.price,
            max_active=self.max_active,
            stall_timeout_s=self.stall_timeout_s,
            worker=[str(WORKER)],
            lender=self.lender,
        )

    async def start(self) -> None:
        self._task = asyncio.create_task(self.jobs.run())

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task
            self._task = None
        await self.jobs.close()

    async def restart(self, *, while_away: float = 0.0) -> None:
        """End the gateway's part, and start it again."""
        await self.stop()
        await asyncio.sleep(while_away)
        self.jobs = self._make()
        await self.start()

    async def add_dataset(self, name: str = "data", text: str = LINE * 40) -> DatasetRecord:
        digest = hashlib.sha256(text.encode()).hexdigest()
        source = self.root / f"{name}.jsonl"
        source.write_text(text)
        await asyncio.to_thread(self.datasets.keep, source, digest)
        return await self.store.add_dataset(
            TENANT, name, sha256=digest, size_bytes=len(text), format=""
        )

    async def create(
        self,
        name: str,
        script: Script | None = None,
        *,
        publish: bool = True,
        max_attempts: int | None = None,
        **hyperparameters: object,
    ) -> JobRecord:
        if script is not None:
            folder = self.root / "scripts"
            folder.mkdir(exist_ok=True)
            (folder / f"{name}.json").write_text(script.model_dump_json())
        spec = self.spec(publish=publish).model_copy(
            update={
                "max_attempts": max_attempts,
                "hyperparameters": Hyperparameters.model_validate(hyperparameters),
            }
        )
        return await self.jobs.create(TENANT, spec, name=name)

    def spec(self, *, publish: bool = True) -> JobSpec:
        return JobSpec(
            dataset="data",
            adapter="pirate",
            publish=PublishSpec(traffic_percent=10) if publish else None,
            cancel_grace_s=self.grace_s,
        )

    async def job(self, name: str) -> JobRecord:
        return await self.store.job(TENANT, name)

    async def until(self, name: str, *states: JobState) -> JobRecord:
        """The job once it is in one of these states, or has ended."""
        async with asyncio.timeout(SOON_S):
            while True:
                job = await self.job(name)
                if job.state in states or job.state.is_final:
                    return job
                await asyncio.sleep(0.02)

    async def until_step(self, name: str, step: int) -> JobRecord:
        async with asyncio.timeout(SOON_S):
            while True:
                job = await self.job(name)
                if job.progress is not None and job.progress["step"] >= step:
                    return job
                await asyncio.sleep(0.02)

    async def ended(self, name: str) -> JobRecord:
        return await self.until(name)

    async def lost(self, name: str) -> list[str]:
        """What became of the attempts that were followed by another."""
        return [
            event.payload["error"]["message"]
            for event in await self.events(name)
            if event.kind is EventKind.STATE_CHANGED and event.payload["state"] == "recovering"
        ]

    async def steps(self, name: str) -> list[int]:
        """The steps that were told, in their order."""
        events = await self.events(name)
        return [event.payload["step"] for event in events if event.kind is EventKind.PROGRESS]

    async def events(self, name: str) -> list[JobEventRecord]:
        return await self.store.job_events(TENANT, name, after=0, limit=1000)

    async def states(self, name: str) -> list[str]:
        """The states that it went through."""
        return [
            event.payload["state"]
            for event in await self.events(name)
            if event.kind is EventKind.STATE_CHANGED
        ]

    def run_folder(self, job: JobRecord, attempt: int = 1) -> RunFolder:
        return RunFolder(self.root / "jobs" / job.uid / "attempts" / str(attempt))

    def processes(self, job: JobRecord) -> list[int]:
        """What runs of it."""
        return members(self.run_folder(job))


def served(root: Path) -> ServedModel:
    return ServedModel(
        name="tiny",
        path=root / "model",
        fingerprints={"base_model_digest": "0" * 64},
        dtype="float32",
        max_model_len=2048,
        max_lora_rank=64,
        target_modules=("q_proj", "v_proj"),
    )


@asynccontextmanager
async def stage(root: Path, **options: object) -> AsyncIterator[Stage]:
    """A stage that runs, with a dataset `data`; nothing waits at a gate."""
    async with AsyncExitStack() as owned:
        store = SqliteJobs(root / "registry.sqlite")
        await owned.enter_async_context(store)
        found = Stage(
            root,
            store,
            DatasetFiles(root),
            CountingPreparations(root),
            ScriptedPublisher(),
            ScriptedLibrary(root),
            **options,  # type: ignore[arg-type]
        )
        found.preparations.gate.set()
        found.publisher.gate.set()
        await found.add_dataset()
        await found.start()
        try:
            yield found
        finally:
            await found.stop()
            end_all(root)


def end_all(root: Path) -> None:
    """Leave no training process behind."""
    for folder in root.glob("jobs/*/attempts/*"):
        assert kill_all(RunFolder(folder))


def gone(pids: Sequence[int]) -> bool:
    """Whether none of these processes lives, within a moment."""
    deadline_s = time.monotonic() + 2.0
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        if time.monotonic() > deadline_s:
            return False
        time.sleep(0.02)
    return True
