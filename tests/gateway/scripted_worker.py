"""Workers that answer their host as a test has written, in this process, over real pipes."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import multiprocessing
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, ClassVar

import pytest

import gateway.workers
from engine.base_model import ModelFingerprints
from engine.core import ClientSlot
from engine.model_info import ModelInfo
from engine.pool import ServedView
from engine.quarantine import Quarantined
from engine.ring import NO_REPLICAS
from gateway.channel import Channel
from gateway.messages import (
    Answer,
    AreYouThere,
    Ask,
    Drain,
    HostMessage,
    Imported,
    Loaded,
    LoadFailed,
    Orders,
    Question,
    Serving,
    ShardDied,
    SlotGranted,
    SlotWithdrawn,
    Unasked,
    WorkerMessage,
)
from gateway.settings import Settings
from gateway.worker_process import WorkerProcess, WorkerState
from gateway.workers import WorkerFleet

SILENT = object()
"""What a script returns for a question that it leaves open."""

Script = Callable[["ScriptedWorker", Question], Any]
"""The answer to a question, or SILENT."""

_numbers = itertools.count(1)


class Slot:
    """Stands for a worker's way into a core."""

    def close(self) -> None:
        """Nothing is open."""


class ScriptedWorker(WorkerProcess):
    """A worker without a process: it attaches to nothing, and is SERVING at once."""

    script: ClassVar[Script]
    born: ClassVar[list[ScriptedWorker]]
    """All that were started, in order."""

    def __init__(self) -> None:
        ours, theirs = multiprocessing.Pipe()
        self.channel = Channel(ours)
        self.state = WorkerState.IMPORTING
        self.slots: list[ClientSlot] = []
        self.failure = ""
        self.number = next(_numbers)
        self.heard: list[HostMessage] = []
        """All that the host said, but for whether it is there."""
        self.hangs = False
        """Whether it reads nothing any more."""
        self.host: Channel[WorkerMessage, HostMessage] = Channel(theirs)
        self.born.append(self)
        self._life = asyncio.create_task(self._live())

    @property
    def pid(self) -> int:
        return -self.number

    def kill(self) -> None:
        self.host.close()

    def reap(self) -> int:
        self.channel.close()
        self._life.cancel()
        return -9

    async def _live(self) -> None:
        self.host.send(Imported())
        while (message := await self.host.receive()) is not None:
            if self.hangs:
                await asyncio.Event().wait()
            if isinstance(message, Ask) and message.question == AreYouThere():
                self.host.send(Answer(message.ticket))
                continue
            self.heard.append(message)
            match message:
                case Orders():
                    self.host.send(Serving())
                case Ask(ticket, question):
                    answer = type(self).script(self, question)
                    if answer is not SILENT:
                        self.host.send(Answer(ticket, answer))
                case Drain():
                    self.host.close()
                case Loaded() | LoadFailed() | SlotGranted() | SlotWithdrawn() | ShardDied():
                    pass


async def _nothing(worker: WorkerProcess) -> None:
    return None


def _deaf(message: Unasked) -> None:
    return None


@contextlib.asynccontextmanager
async def serving_fleet(
    monkeypatch: pytest.MonkeyPatch,
    count: int,
    script: Script,
    *,
    after_death: Callable[[WorkerProcess], Awaitable[None]] = _nothing,
    hear: Callable[[Unasked], None] = _deaf,
    stall_timeout_s: float = 30.0,
) -> AsyncIterator[tuple[WorkerFleet, list[ScriptedWorker]]]:
    """A fleet of `count` workers that serve, and those workers in the order of their start."""

    class Worker(ScriptedWorker):
        born: ClassVar[list[ScriptedWorker]] = []

    Worker.script = script
    monkeypatch.setattr(gateway.workers, "WorkerProcess", Worker)
    fleet = WorkerFleet(count, orders, after_death, hear, stall_timeout_s=stall_timeout_s)
    running = asyncio.create_task(fleet.run())
    await asyncio.sleep(0)  # it starts its workers
    fleet.open()
    async with asyncio.timeout(10):
        await fleet.wait_serving()
    try:
        yield fleet, [worker for worker in Worker.born if worker.slots]
    finally:
        await fleet.drain(0.0, 0.0)
        await running


def orders() -> Orders:
    """For a worker that follows none of them."""
    slots: list[Any] = [Slot()]
    return Orders(
        slots=slots,
        shards=["shard-0"],
        model=ModelInfo("float32", "", "Llama", 1024, 512, "", ""),
        listen="127.0.0.1:0",
        control_address="unix:/nowhere",
        settings=Settings(),
        fingerprints=ModelFingerprints("", "", "", ""),
        view=ServedView(),
        resident={},
        granted={},
        plan=NO_REPLICAS,
        named=frozenset(),
        drained=frozenset(),
        quarantined=Quarantined(),
    )
