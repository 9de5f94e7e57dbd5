"""A residency that runs, with a core and a crowd around it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

from engine.adapter_loader import LoadPhase
from engine.errors import LoadFault
from engine.generation import VersionKey
from engine.residency import Residency
from engine.residents import Resident
from tests.engine.crowd import Core, Crowd, Process, Stock

A, B, C, D = (VersionKey("acme", name, 1) for name in "abcd")
SOON_S = 30.0


@dataclass
class Stage:
    """A residency that runs, and everybody around it."""

    core: Core
    crowd: Crowd
    stock: Stock
    residency: Residency
    runs: asyncio.Task[None]
    loads: list[tuple[str, bool]] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    faults: list[LoadFault] = field(default_factory=list)
    phases: list[tuple[LoadPhase, bool]] = field(default_factory=list)

    @property
    def process(self) -> Process:
        return self.crowd.processes[0]

    async def use(self, key: VersionKey) -> None:
        """A request that ends at once."""
        residents = self.process.residents
        residents.release(await residents.hold(key))


@asynccontextmanager
async def stage(places: int, processes: int = 1) -> AsyncIterator[Stage]:
    core, stock = Core(places), Stock(A, B, C, D)
    crowd = Crowd(core, processes)
    loads: list[tuple[str, bool]] = []
    counts: list[int] = []
    faults: list[LoadFault] = []
    phases: list[tuple[LoadPhase, bool]] = []

    def observe_load(shard: str, phase: LoadPhase, duration_s: float, ok: bool) -> None:
        assert duration_s >= 0.0
        phases.append((phase, ok))
        if phase is LoadPhase.ALL:
            loads.append((shard, ok))

    residency = Residency(
        core,
        places,
        stock,
        crowd,
        observe_load,
        lambda shard, count: counts.append(count),
        faults.append,
    )
    crowd.serve(residency)
    runs = asyncio.create_task(residency.run())
    at = Stage(core, crowd, stock, residency, runs, loads, counts, faults, phases)
    try:
        async with asyncio.timeout(SOON_S):
            yield at
    finally:
        for process in crowd.processes:
            await process.residents.close()
        runs.cancel()
        with suppress(asyncio.CancelledError):
            await runs  # raises what ended it before its time


async def settled() -> None:
    """Let all that can run, run."""
    for _ in range(30):
        await asyncio.sleep(0)


async def happens(condition: Callable[[], object]) -> None:
    """Wait until it does; the stage's timeout ends what does not."""
    while not condition():
        await asyncio.sleep(0.001)


def started(work: Awaitable[Resident]) -> asyncio.Future[Resident]:
    return asyncio.ensure_future(work)
