"""A host that may be killed at any moment, and the world in which it runs: the trainer's own code
between a store that lasts and a machine that lasts."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from store.job_records import DatasetRecord, JobRecord
from tests.trainer.simulation.machine import ROOT, Machine
from tests.trainer.simulation.virtual_loop import VirtualLoop, resolve
from trainer.devices import Device
from trainer.events import Publication, PublicationState
from trainer.jobs import Jobs
from trainer.library import LibraryVersion
from trainer.preparation import Prepared
from trainer.publisher import Finding
from trainer.report import DatasetReport
from trainer.served import ServedModel
from trainer.spec import DataSpec, JobSpec, PublishSpec

HOST: ContextVar[Host | None] = ContextVar("host", default=None)
"""On whose behalf the code runs; None: nobody's, as processes do."""
STEPS_S = (0.0, 0.0, 0.0, 0.0, 0.0, 0.05, 0.3)
"""What a call of the store or of a thread may take."""


class Host:
    """One process of the gateway. Dead, nothing that it does reaches the world."""

    def __init__(self, world: World, number: int) -> None:
        self.world = world
        self.number = number
        self.began_s = world.clock_ns() / 1e9
        self.died = asyncio.Event()
        self.tasks: set[asyncio.Task[Any]] = set()
        self.store = HostStore(self)
        self.jobs = Jobs(
            self.store,
            Datasets(),  # type: ignore[arg-type]
            Preparer(self),
            Publisher(self),
            SERVED,
            world.devices,
            ROOT,
            library=NoLibrary(),
            python="python",
            environment={},
            stall_timeout_s=4.0,
            clock_ns=world.clock_ns,
        )

    def spawn(self, work: Any) -> asyncio.Task[Any]:
        """Do something on its behalf."""
        token = HOST.set(self)
        try:
            task = asyncio.create_task(work)
        finally:
            HOST.reset(token)
        self.tasks.add(task)
        return task

    @property
    def dead(self) -> bool:
        return self.died.is_set()

    async def point(self) -> None:
        """A moment in which it may be killed, or somebody else may be first."""
        self.world.points += 1
        if self.world.kills():
            self.died.set()
        if self.dead:
            await asyncio.Event().wait()
        if (pause_s := self.world.chance.choice(STEPS_S)) > 0:
            await asyncio.sleep(pause_s)
            if self.dead:
                await asyncio.Event().wait()


class HostStore:
    """The store as a host reaches it: it may die before a transaction, and after it."""

    def __init__(self, host: Host) -> None:
        self._host = host

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self._host.world.store, name)

        async def call(*arguments: Any, **options: Any) -> Any:
            await self._host.point()
            result = await method(*arguments, **options)
            await self._host.point()
            return result

        return call


class Datasets:
    """Where datasets are, which nobody reads."""

    def path(self, sha256: str) -> Path:
        return Path(ROOT, sha256)


class NoLibrary:
    """No job of a story begins with another's weights."""

    modules: Mapping[str, tuple[int, int]] = {}

    async def version(self, tenant: str, adapter: str, version: int | None) -> LibraryVersion:
        raise AssertionError("nobody asks")


class Preparer:
    def __init__(self, host: Host) -> None:
        self._host = host

    async def prepare(self, dataset: DatasetRecord, path: Path, data: DataSpec) -> Prepared:
        await self._host.point()
        report = DatasetReport(valid=True, total_lines=9, rows=9)
        return Prepared(folder=Path("rows"), report=report, dataset=dataset.name)


class Publisher:
    """Makes a version of what it is given, once for the same checkpoint, as the catalog does."""

    def __init__(self, host: Host) -> None:
        self._host = host

    def findings(self, spec: JobSpec) -> Sequence[Finding]:
        return ()

    async def publish(
        self, job: JobRecord, checkpoint: Path, adapter: str, publish: PublishSpec
    ) -> Publication:
        await self._host.point()
        attempt, step = int(checkpoint.parents[1].name), int(checkpoint.name.rsplit("-", 1)[-1])
        versions = self._host.world.machine.published.setdefault(job.uid, set())
        versions.add((adapter, attempt, step))
        if len(versions) > 1:
            self._host.world.machine.breaks(f"{job.name} is published twice: {versions}")
        await self._host.point()
        return Publication(state=PublicationState.SERVING, adapter=adapter, version=1)


class World:
    """One seed: what lasts, and the chance that decides."""

    def __init__(self, seed: int, loop: VirtualLoop, make_store: Callable[..., Any]) -> None:
        self.chance = random.Random(seed)
        self.machine = Machine(self.chance, faults=self.chance.choice([0.0, 0.05, 0.15]))
        self.crashes = self.chance.choice([0.0, 0.01, 0.04])
        """How likely the host is killed at a point."""
        self.devices = [Device(name) for name in self.chance.choice(["0", "0", "01"])]
        self.is_calm = False
        self.points = 0
        self.hosts: list[Host] = []
        self._uids = 0
        self._loop = loop
        self.store = make_store(self.clock_ns, self._make_uid)
        loop.threads = self._thread

    def clock_ns(self) -> int:
        return round(self._loop.time() * 1e9) + 1

    def kills(self) -> bool:
        return self.chance.random() < self.crashes

    def calm(self) -> None:
        """From now on nothing goes wrong any more."""
        self.crashes = self.machine.faults = 0.0
        self.is_calm = True

    async def lives(self) -> AsyncIterator[Host]:
        """Hosts, one after the other, each once the one before is dead."""
        while True:
            host = Host(self, len(self.hosts) + 1)
            self.hosts.append(host)
            host.spawn(host.jobs.run())
            yield host
            await host.died.wait()
            await asyncio.sleep(self.chance.uniform(0.0, 2.0))

    def _thread(self, work: Callable[[], Any], future: asyncio.Future[Any]) -> None:
        """Work of a thread, which takes a moment and is cut off when its host dies."""
        host = HOST.get()
        if host is None:
            resolve(work, future)
            return
        self.points += 1
        if self.kills():
            host.died.set()
        if host.dead:
            return  # never
        before_s = self.chance.choice(STEPS_S)
        if before_s:
            self._loop.call_later(before_s, self._work, host, work, future)
        else:
            self._work(host, work, future)

    def _work(self, host: Host, work: Callable[[], Any], future: asyncio.Future[Any]) -> None:
        if host.dead:
            return
        resolve(work, future)  # a thread is not cancelled, so it does this to its end
        if self.kills():
            host.died.set()

    def _make_uid(self) -> str:
        self._uids += 1
        return f"{self._uids:032x}"


SERVED = ServedModel(
    name="tiny",
    path=Path("model"),
    fingerprints={"base_model_digest": "0" * 64},
    dtype="float32",
    max_model_len=2048,
    max_lora_rank=64,
    target_modules=("q_proj", "v_proj"),
)
