"""One seed from begin to end: owners, watchers, hosts that die, and what must be true after it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from store.job_records import EventKind, Intent, JobEventRecord, JobRecord, JobState, JobUnknown
from store.sqlite_jobs import SqliteJobs
from tests.trainer.simulation.fairness import Fairness, courses
from tests.trainer.simulation.host import Host, World
from tests.trainer.simulation.machine import STEPS, Broken
from tests.trainer.simulation.memory_jobs import MemoryJobs
from tests.trainer.simulation.patches import Ground, put
from tests.trainer.simulation.virtual_loop import VirtualLoop
from trainer.errors import TrainingError
from trainer.recovery import attempts_left, recovery_of
from trainer.spec import Hyperparameters, JobSpec, PublishSpec

TENANTS = ("acme", "blue", "coal")
TROUBLE_S, PATIENCE_S = 15.0, 600.0
"""How long things go wrong, and how long what is left may then take."""


@dataclass
class Found:
    """What one seed did."""

    points: int = 0
    """Moments at which the host might have been killed."""
    hosts: int = 0
    processes: int = 0
    events: int = 0
    grants: int = 0
    """Devices that were given to a job while another waited, once for each that did."""
    states: Counter[JobState] = field(default_factory=Counter)
    trace: list[tuple[Any, ...]] = field(default_factory=list)

    def add(self, other: Found) -> None:
        """Count what another seed did, too."""
        self.points += other.points
        self.hosts += other.hosts
        self.processes += other.processes
        self.events += other.events
        self.grants += other.grants
        self.states += other.states


class Story:
    """What happens to one world."""

    def __init__(self, world: World) -> None:
        self.world = world
        jobs = world.chance.choice([1, 1, 1, 2, 2, 4])
        self.names = [f"job-{number}" for number in range(jobs)]
        self.tenants = {name: world.chance.choice(TENANTS[:jobs]) for name in self.names}
        self.wished: set[str] = set()
        """Jobs of which somebody wished for something."""
        self.watched: list[str] = []
        self.seen: dict[str, list[int]] = {name: [] for name in self.names}
        self.tasks: list[asyncio.Task[Any]] = []

    async def play(self) -> list[JobRecord]:
        world, chance = self.world, self.world.chance
        for tenant in sorted(set(self.tenants.values())):
            await world.store.add_dataset(tenant, "data", sha256="0" * 64, size_bytes=1, format="")
        self.tasks.append(asyncio.create_task(self._hosts()))
        for name in self.names:
            self.tasks.append(asyncio.create_task(self._owner(name, chance.uniform(0.0, 3.0))))
        self.watched = [name for name in self.names if chance.random() < 0.3]
        for name in self.watched:
            self.tasks.append(asyncio.create_task(self._watcher(name)))
        asyncio.get_running_loop().call_later(TROUBLE_S, world.calm)
        return await self._all_ended()

    async def _hosts(self) -> None:
        async for _ in self.world.lives():
            pass

    async def _host(self) -> Host:
        while not self.world.hosts or self.world.hosts[-1].dead:
            await asyncio.sleep(0.1)
        return self.world.hosts[-1]

    async def _ask(self, call: Callable[[Host], Any]) -> None:
        """One call of a client, which the death of its host cuts off."""
        host = await self._host()
        task = host.spawn(call(host))
        died = asyncio.create_task(host.died.wait())
        await asyncio.wait({task, died}, return_when=asyncio.FIRST_COMPLETED)
        died.cancel()
        if task.done():
            with contextlib.suppress(TrainingError):
                task.result()

    async def _owner(self, name: str, begins_s: float) -> None:
        chance, tenant = self.world.chance, self.tenants[name]
        priority = chance.choice([0, 0, 0, 1, -2])
        await asyncio.sleep(begins_s)
        spec = JobSpec(
            dataset="data",
            adapter="sea",
            max_attempts=chance.choice([None, None, 1, 6]),
            hyperparameters=Hyperparameters(micro_batch_size=chance.choice([1, 4])),
            publish=PublishSpec() if chance.random() < 0.8 else None,
            cancel_grace_s=chance.choice([0.0, 1.0]),
        )
        while await self._job(name) is None:
            await self._ask(
                lambda host: host.jobs.create(tenant, spec, name=name, priority=priority)
            )
        if len(self.names) > 2:  # wishes would hide whose turn it is
            return
        for _ in range(chance.choice([0, 0, 1, 2, 3])):
            await asyncio.sleep(chance.uniform(0.0, 4.0))
            self.wished.add(name)
            wish = chance.choice(["pause", "pause", "resume", "resume", "cancel", "discard"])
            if wish in ("cancel", "discard"):
                discard = wish == "discard"
                await self._ask(lambda host: host.jobs.cancel(tenant, name, discard=discard))  # noqa: B023
            else:
                await self._ask(lambda host: getattr(host.jobs, wish)(tenant, name))  # noqa: B023

    async def _watcher(self, name: str) -> None:
        """Sees every event once, in order, whatever becomes of the hosts."""
        seen = self.seen[name]

        async def watch(host: Host) -> None:
            items = host.jobs.watch(self.tenants[name], name, after=len(seen), heartbeat_s=60.0)
            async for item in items:
                if isinstance(item, JobEventRecord):
                    if item.sequence != len(seen) + 1:
                        raise Broken(f"{name}: {item.sequence} came after {len(seen)}")
                    seen.append(item.sequence)

        while await self._job(name) is None:
            await asyncio.sleep(0.2)
        while (
            not (job := await self._job(name))
            or len(seen) < job.last_sequence
            or (not job.state.is_final)
        ):
            await self._ask(watch)

    async def _job(self, name: str) -> JobRecord | None:
        try:
            found: JobRecord = await self.world.store.job(self.tenants[name], name)
        except JobUnknown:
            return None
        return found

    async def _all_ended(self) -> list[JobRecord]:
        """All jobs, once they have ended: those that are paused are resumed for that."""
        for _ in range(round(PATIENCE_S)):
            self._raise()
            jobs = [await self._job(name) for name in self.names]
            if all(job is not None and job.state.is_final for job in jobs) and all(
                len(self.seen[job.name]) == job.last_sequence
                for job in jobs
                if job and job.name in self.watched
            ):
                return [job for job in jobs if job]
            for job in jobs:
                paused = job is not None and job.intent is Intent.PAUSE
                if job is not None and paused and self.world.is_calm and not job.state.is_final:
                    key = job.key
                    await self._ask(lambda host: host.jobs.resume(*key))  # noqa: B023
            await asyncio.sleep(1.0)
        raise Broken(f"lost: {[(job.name, job.state, self.seen[job.name]) for job in jobs if job]}")

    def _raise(self) -> None:
        """What went wrong where nobody looked."""
        if self.world.machine.broken:
            raise Broken("; ".join(self.world.machine.broken))
        of_hosts = [task for host in self.world.hosts for task in host.tasks]
        for task in [*self.tasks, *of_hosts]:
            error = task.exception() if task.done() and not task.cancelled() else None
            if error is not None and not isinstance(error, TrainingError):
                raise error


async def check(world: World, story: Story, jobs: list[JobRecord], found: Found) -> None:
    """What must be true of jobs that have ended."""
    told_of_all = list[tuple[JobRecord, list[JobEventRecord]]]()
    for job in jobs:
        events = await world.store.job_events(job.tenant, job.name, after=0, limit=10_000)
        told_of_all.append((job, events))
        found.events += len(events)
        found.states[job.state] += 1
        found.trace += [
            (job.name, event.sequence, event.attempt, event.kind.value, str(event.payload))
            for event in events
        ]
        assert [event.sequence for event in events] == list(range(1, len(events) + 1))
        states = [e.payload["state"] for e in events if e.kind is EventKind.STATE_CHANGED]
        assert [state for state in states if JobState(state).is_final] == [job.state.value]
        assert (job.error is not None) == (job.state is JobState.FAILED)
        told = recovery_of(job)
        spec = JobSpec.model_validate(job.effective_spec)
        assert told.spent == 0 or attempts_left(spec, told) > 0, "else it would have FAILED"
        steps = [e.payload["step"] for e in events if e.kind is EventKind.PROGRESS]
        assert all(step <= before + 1 for before, step in zip([0, *steps], steps, strict=False))
        told_of = [e.payload["state"] for e in events if e.kind is EventKind.PUBLICATION]
        assert "serving" not in told_of[:-1], "what serves is not published again"
        published = world.machine.published.get(job.uid, set())
        if job.state is JobState.SUCCEEDED:
            assert set(steps) == set(range(1, STEPS + 1)), "none is left out"
            assert job.manifest is not None
            saved = job.manifest["checkpoint"]
            assert (saved["attempt"], saved["step"]) == (job.attempt, STEPS)
            wanted = {("sea", job.attempt, STEPS)} if spec.publish else set()
            assert published == wanted
        elif job.state is JobState.FAILED:
            assert not published
    fairness = Fairness(courses(told_of_all, story.wished), [host.began_s for host in world.hosts])
    found.grants += fairness.check()
    fairness.check_uses(await world.store.device_uses(), world.clock_ns() / 1e9)
    assert not [run for run in world.machine.runs.values() if run.lives and run.process.awake]  # type: ignore[union-attr]


@contextlib.contextmanager
def stage() -> Iterator[Callable[..., Found]]:
    """Plays seeds, one after the other: `play(seed, make_store)`."""
    loop, ground = VirtualLoop(), Ground()
    logging.disable(logging.CRITICAL)
    try:
        with pytest.MonkeyPatch.context() as patch:
            put(patch, ground, loop)
            yield lambda seed, make_store=MemoryJobs: play(seed, ground, loop, make_store)
    finally:
        logging.disable(logging.NOTSET)
        loop.close()


def simulate(seeds: Iterable[int]) -> Found:
    """Many seeds, in this process."""
    total = Found()
    with stage() as play:
        for seed in seeds:
            total.add(play(seed))
    return total


def play(seed: int, ground: Ground, loop: VirtualLoop, make_store: Callable[..., Any]) -> Found:
    """One seed from begin to end."""

    async def whole() -> Found:
        world = World(seed, loop, make_store)
        ground.machine = world.machine
        found = Found()
        if isinstance(world.store, SqliteJobs):
            await world.store.open()
        story = Story(world)
        try:
            jobs = await story.play()
            await check(world, story, jobs, found)
        finally:
            for host in world.hosts:
                host.died.set()
            rest = asyncio.all_tasks() - {asyncio.current_task()}
            for task in rest:
                task.cancel()
            await asyncio.gather(*rest, return_exceptions=True)
            if isinstance(world.store, SqliteJobs):
                await world.store.close()
        found.points, found.hosts = world.points, len(world.hosts)
        found.processes = world.machine.started
        return found

    loop.rewind()
    try:
        return loop.run_until_complete(whole())
    except BaseException as error:
        error.add_note(f"SEED={seed}")
        raise
