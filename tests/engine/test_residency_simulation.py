"""Random lives of versions over several processes, with messages on their way.

The rules are those of `tests/engine/crowd.py`: the core is never overfull, nothing is removed
under a request, no id comes back after a failed load. Here: everybody who waits is answered.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from types import SimpleNamespace

import pytest

from engine import forgetting
from engine import residency as residency_module
from engine import residents as residents_module
from engine.errors import AdapterLoadFailed
from engine.generation import VersionKey
from engine.residency import Residency
from tests.engine.crowd import Core, Crowd, Process, Stock
from tests.engine.virtual_time import VirtualTimeLoop

KEYS = [VersionKey("acme", f"adapter-{number}", 1) for number in range(6)]
PLACES = 3
REQUESTS = 150
RUN_S = 0.02
"""How long a request lasts at most."""
GIVE_UP_S = 0.01
DONE_S = 60.0
"""Of virtual time, in which a run takes half a second; this only ends one that hangs."""


class World:
    """A core, its processes, and requests that come and go."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.core = Core(PLACES)
        self.core.load_s, self.core.unload_s = 0.004, 0.001
        self.stock = Stock(*KEYS)
        self.crowd = Crowd(self.core, 3, delays=self.random)
        self.residency = Residency(self.core, PLACES, self.stock, self.crowd)
        self.crowd.serve(self.residency)
        self.outcomes: Counter[str] = Counter()

    async def live(self) -> None:
        runs = asyncio.create_task(self.residency.run())
        lives = asyncio.gather(
            *(self._request() for _ in range(REQUESTS)),
            *(self._remove() for _ in range(10)),
            *(self._fail() for _ in range(5)),
            *(self._ensure() for _ in range(10)),
            self._join(),
        )
        done, _ = await asyncio.wait(
            (runs, lives), timeout=DONE_S, return_when=asyncio.FIRST_COMPLETED
        )
        if lives not in done:
            lives.cancel()
            await asyncio.gather(lives, return_exceptions=True)
        if runs.done():
            await runs
        assert done, "somebody waits for ever"
        await lives
        runs.cancel()
        await asyncio.gather(runs, return_exceptions=True)
        for process in self.crowd.processes:
            await process.residents.close()
        await asyncio.sleep(RUN_S)  # the last aborts reach the core
        self._check()

    def _check(self) -> None:
        asked = ("answered", "gave up", "not loaded")
        assert sum(self.outcomes[outcome] for outcome in asked) == REQUESTS
        assert self.outcomes["answered"] > REQUESTS / 2
        assert len(set(self.core.loads)) > PLACES, "somebody had to go"
        assert not +self.core.requests
        for process in self.crowd.processes:
            uses = process.residents.uses()
            assert not any(use.holds for use in uses.values())
            assert uses.keys() <= self.core.keys

    async def _while(self, most_s: float) -> None:
        await asyncio.sleep(self.random.uniform(0.0, most_s))

    async def _request(self) -> None:
        await self._while(0.2)
        process = self.random.choice(self.crowd.processes)
        key = self.random.choices(KEYS, weights=[8, 5, 3, 2, 1, 1])[0]
        try:
            if self.random.random() < 0.2:
                await asyncio.wait_for(self._generate(process, key), GIVE_UP_S)
            else:
                await self._generate(process, key)
        except TimeoutError:
            self.outcomes["gave up"] += 1
        except AdapterLoadFailed:
            self.outcomes["not loaded"] += 1
        else:
            self.outcomes["answered"] += 1

    async def _generate(self, process: Process, key: VersionKey) -> None:
        """As the edge does it: hold, generate, release. An abort reaches the core late."""
        resident = await process.residents.hold(key)
        version = resident.version
        try:
            assert version.key == key
            await self._while(RUN_S / 3)
            process.begin(version)
            try:
                await self._while(RUN_S)
            except asyncio.CancelledError:
                delay_s = self.random.uniform(0.0, RUN_S)
                asyncio.get_running_loop().call_later(delay_s, process.forget, version)
                raise
            else:
                process.forget(version)
        finally:
            process.residents.release(resident)

    async def _remove(self) -> None:
        """As a deletion does it: refuse it first. Later it is there again."""
        await self._while(0.2)
        key = self.random.choice(KEYS)
        if key in self.stock.refused:
            return
        self.stock.refused[key] = "it is DRAINING"
        await self.residency.remove(key)
        assert key not in self.core.keys, "its files are about to be deleted"
        await self._while(0.02)
        del self.stock.refused[key]

    async def _fail(self) -> None:
        await self._while(0.2)
        self.core.refusals[self.random.choice(KEYS)] += self.random.choice((1, 2))

    async def _ensure(self) -> None:
        await self._while(0.2)
        try:
            await self.residency.ensure(self.random.choice(KEYS))
        except AdapterLoadFailed:
            self.outcomes["not loaded ahead"] += 1

    async def _join(self) -> None:
        await self._while(0.1)
        self.crowd.join()


@pytest.mark.parametrize("seed", range(30))
def test_everybody_is_answered_and_nothing_is_removed_under_a_request(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(residency_module, "FAILURE_KEPT_S", 0.005)
    monkeypatch.setattr(residency_module, "SURVEY_INTERVAL_S", 0.005)
    monkeypatch.setattr(forgetting, "CORE_POLL_S", 0.0005)
    loop = VirtualTimeLoop()
    clock = SimpleNamespace(monotonic=loop.time, time=loop.time)
    monkeypatch.setattr(residency_module, "time", clock)
    monkeypatch.setattr(residents_module, "time", clock)
    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        runner.run(World(seed).live())
