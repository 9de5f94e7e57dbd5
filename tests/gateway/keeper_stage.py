"""A shard's keeper over fake cores, which a test has live, die, hang and sleep."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

import pytest

from engine.core import EngineOptions
from engine.core_death import CoreDeath
from engine.errors import ShardUnavailable
from engine.screening import Screening
from engine.step_record import StepRecord
from gateway import driven_core as module
from gateway import silence
from gateway.keeper import ShardKeeper
from gateway.keeper_state import KeeperState
from gateway.restarts import Restarts

TIMEOUT_S = 5.0
STALL_S = 0.05


class FakeShard:
    """The host's client of a fake core."""

    def __init__(self, core: FakeCore) -> None:
        self.name = "shard-1"
        self.core = core
        self.broken = False
        self.closed = False
        self.said_dead = False
        self.verdict: bool | None = None
        self.called: list[str] = []
        self.dead = asyncio.Event()

    async def call_core(self, utility: str, *arguments: int | str, timeout_s: float = 1.0) -> Any:
        self.called.append(utility)
        if utility == self.core.is_silent_in:
            self.core.stopped = True
            await asyncio.sleep(4 * STALL_S)
            self.core.stopped = False
        if (fails := self.core.fails.get(utility)) is not None:
            raise fails
        if utility == "gateway_record":
            self.core.record = StepRecord(Path(str(arguments[0])), 2, 8, 2)
        return [4711] if utility == "gateway_adopt" else 3

    async def warm_up(self) -> None:
        if self.core.hangs_at_first:
            await self.dead.wait()
            raise ShardUnavailable(self.name)

    async def respond(self) -> None:
        if self.core.stopped:
            await asyncio.Event().wait()

    def declare_dead(self, crashed: bool) -> None:
        self.verdict = crashed
        self.broken = True
        self.dead.set()

    def close(self) -> None:
        self.closed = True


class FakeCore:
    """A core that lives until a test ends it."""

    def __init__(self) -> None:
        self.name = "shard-1"
        self.died = asyncio.Event()
        self.stopped = False
        self.hangs_at_first = False
        self.greets = True
        self.is_silent_in = ""
        """A utility in which it answers nothing else, for longer than it may when it serves."""
        self.fails: dict[str, Exception] = {}
        """What utilities raise."""
        self.ends: list[str] = []
        self.slots_left = 63
        self.code, self.is_stopped = -9, False
        self.record_path = Path()
        self.record: Any = None
        self.index = 1
        self.shard = FakeShard(self)

    def take_slot(self) -> Any:
        return self

    def issued(self, slot: object) -> bool:
        return slot is self

    def adopt(self, pids: list[int]) -> None:
        assert pids == [4711]

    async def ended(self) -> None:
        await self.died.wait()

    async def exit_code(self) -> int:
        return self.code

    async def stop(self, ask: Callable[[], Any] | None = None) -> None:
        if ask is not None:
            await ask()
        self.ends.append("killed" if ask is None else "in order")


class Options:
    """Those of a core that a keeper asks for."""

    def __init__(self, sleeps: bool) -> None:
        self.sleeps = sleeps

    def build_config(self) -> object:
        return object()


class Stage:
    """A keeper, the cores that it starts, and all who follow it."""

    def __init__(self, run_dir: Path, sleeps: bool = False) -> None:
        self.run_dir = run_dir
        self.options = cast(EngineOptions, Options(sleeps))
        self.started: list[tuple[int, str]] = []
        self.keeper = self.keeper_with(Restarts(lambda: 0.0))
        self.planned: list[FakeCore | Exception] = []
        """What the next starts come to; a core that lives if nothing is said."""
        self.cores: list[FakeCore] = []
        self.told: list[str] = []
        self.deaths: list[CoreDeath] = []
        self.may_prepare = asyncio.Event()
        self.may_prepare.set()

    def keeper_with(self, restarts: Restarts | None = None) -> ShardKeeper:
        rest = STALL_S, self.run_dir, Screening(), restarts
        tell = lambda *process: self.started.append(process)  # noqa: E731
        return ShardKeeper("shard-1", self.options, nullcontext, *rest, started=tell)

    async def start_core(self, record_path: Path) -> FakeCore:
        planned = self.planned.pop(0) if self.planned else FakeCore()
        if isinstance(planned, Exception):
            raise planned
        planned.record_path = record_path
        self.cores.append(planned)
        return planned

    def lose(self, shard: str, death: CoreDeath) -> None:
        self.deaths.append(death)
        self.told.append(f"lost {self.keeper.state.value}")

    async def prepare(self, shard: Any) -> None:
        self.told.append(f"prepares {self.keeper.state.value}")
        await self.may_prepare.wait()

    async def admit(self, shard: str, take_slot: Callable[[], Any]) -> None:
        assert take_slot() is self.cores[-1]
        self.told.append(f"admitted {self.keeper.state.value}")

    async def until(self, state: KeeperState, cores: int) -> None:
        async with asyncio.timeout(TIMEOUT_S):
            while (self.keeper.state, len(self.cores)) != (state, cores):
                await asyncio.sleep(0)


@asynccontextmanager
async def keeping(
    monkeypatch: pytest.MonkeyPatch, run_dir: Path, *, sleeps: bool = False
) -> AsyncIterator[Stage]:
    """A keeper whose first core is up, and which keeps. Its cores can sleep, or not."""
    at = Stage(run_dir, sleeps)

    class Cores:
        @staticmethod
        async def start(
            name: str, config: Any, record_path: Path, environment: Any, started: Any
        ) -> Any:
            core = await at.start_core(record_path)
            started(42, f"core of {name}")
            return core

    class Shards:
        @staticmethod
        def attach(core: FakeCore, screening: Screening) -> FakeShard:
            if not core.greets:
                raise TimeoutError
            return core.shard

    monkeypatch.setattr(module, "EngineCore", Cores)
    monkeypatch.setattr(module, "VllmShard", Shards)
    monkeypatch.setattr(silence, "STEP_S", 0.01)
    await at.keeper.start()
    at.keeper.settled = True
    keeps = asyncio.create_task(at.keeper.keep(at))
    yield at
    keeps.cancel()
    await asyncio.gather(keeps, return_exceptions=True)
    await at.keeper.stop()
