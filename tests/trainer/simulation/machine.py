"""What is on the machine beside the host: devices, folders of runs, and training processes.

The processes follow the run folder's contract as `trainer/worker.py` does, with steps of a moment
and deaths by chance. What they write is there when they are gone.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from trainer.ending import Ending, Failed, Finished, Lost, Stopped, lost
from trainer.event_file import Line
from trainer.events import (
    Checkpoint,
    FailureReason,
    JobFailure,
    Manifest,
    Progress,
    WorkerEvent,
    WorkerEventKind,
)
from trainer.failure import out_of_memory
from trainer.run_folder import RunExit, RunFolder, RunPlan, StopRequest
from trainer.spec import JobSpec

LINE_BYTES = 100
STEPS = 5


class Nowhere(type(Path())):  # type: ignore[misc]
    """A path on the simulated disk."""

    def mkdir(self, *_: object, **__: object) -> None:
        """There is nothing to make."""


ROOT = Nowhere("/simulated")


class Broken(AssertionError):
    """Something happened that must never happen."""


@dataclass(slots=True)
class Run:
    """The folder of one attempt."""

    path: Path
    uid: str
    attempt: int
    plan: RunPlan | None = None
    locked: bool = False
    """Whether the lock's file was ever made."""
    process: Process | None = None
    lines: list[Line] = field(default_factory=list)
    stop: StopRequest | None = None
    exit: RunExit | None = None
    manifest: Manifest | None = None
    checkpoints: dict[int, bool] = field(default_factory=dict)
    """Sealed ones, by step: whether their files are what was saved."""

    @property
    def lives(self) -> bool:
        return self.process is not None and self.process.lives


class Machine:
    """All that survives a host."""

    def __init__(self, chance: random.Random, faults: float) -> None:
        self.chance = chance
        self.faults = faults
        """How likely a process comes to grief at one step; 0 once it is to be quiet."""
        self.runs: dict[Path, Run] = {}
        self.fence: dict[str, int] = {}
        """The newest attempt of each job."""
        self.broken: list[str] = []
        """What must never happen, and did: the code under test may swallow an exception."""
        self.started = 0
        self.published: dict[str, set[tuple[str, int, int]]] = {}
        """Versions by job: name of the adapter, attempt and step."""

    def breaks(self, what: str) -> None:
        self.broken.append(what)
        raise Broken(what)

    def run(self, run: RunFolder) -> Run:
        found = self.runs.get(run.path)
        if found is None:
            uid, attempt = run.path.parents[1].name, int(run.path.name)
            found = self.runs[run.path] = Run(run.path, uid, attempt)
        return found

    def start(self, run: RunFolder, plan: RunPlan) -> Process:
        mine = self.run(run)
        for other in self.runs.values():
            # One that the kernel did not let go of ends as it wakes: its number is no more.
            if other.process is None or not other.process.lives or other.process.given_up:
                continue
            if other.uid == mine.uid:
                self.breaks(f"{mine.uid} runs twice: attempts {other.attempt}, {mine.attempt}")
            if other.plan is not None and other.plan.device == plan.device:
                self.breaks(f"two jobs run on device {plan.device}")
        if self.fence.get(mine.uid) != mine.attempt:
            self.breaks("an attempt is started that the fence does not name")
        self.started += 1
        mine.plan, mine.locked = plan, True
        mine.process = Process(self, mine, plan)
        return mine.process

    def kill(self, run: RunFolder) -> bool:
        """Whether nothing of it is left."""
        process = self.run(run).process
        if process is None or not process.lives:
            return True
        if process.awake and self.chance.random() < 0.02 * bool(self.faults):
            process.fall_asleep()
        if not process.awake:
            return False
        process.end(-9)
        return True

    def newest(self, uid: str, attempts: int) -> Checkpoint | None:
        runs = {run.attempt: run for run in self.runs.values() if run.uid == uid}
        for attempt in range(attempts, 0, -1):
            run = runs.get(attempt)
            for step in sorted(run.checkpoints, reverse=True) if run else ():
                assert run is not None
                if run.checkpoints[step]:
                    return checkpoint(run, step)
        return None


class Process:
    """One training process, as a task of its own."""

    def __init__(self, machine: Machine, run: Run, plan: RunPlan) -> None:
        self._machine = machine
        self._run = run
        self._plan = plan
        self.lives = True
        self.awake = True
        """False: it waits for a disk, so that no signal reaches it."""
        self.hangs = False
        self.given_up = False
        """Whether it could not be killed when it was to be."""
        self.exit_code: int | None = None
        self.signals = 0
        self._waking = asyncio.Event()
        self._task = asyncio.create_task(self._live())

    def end(self, code: int) -> None:
        self.lives, self.exit_code = False, code
        self._task.cancel()

    def fall_asleep(self) -> None:
        self.awake, self.given_up = False, True
        asyncio.get_running_loop().call_later(self._machine.chance.uniform(1, 60), self._wake)

    def _wake(self) -> None:
        self.awake = True
        if self._fenced:
            self.end(4)
        self._waking.set()

    def terminate(self) -> None:
        if self.awake:
            self.signals += 1
            if self.signals > 1 or self._run.stop is not None:
                self.end(143)

    async def _live(self) -> None:
        try:
            code = await self._train()
            if code in (0, 1, 3):  # it has said its last, and takes its time to end
                await self._pass(self._machine.chance.choice([0.0, 0.0, 5.0]))
        except asyncio.CancelledError:
            return
        self.lives, self.exit_code = False, code

    async def _train(self) -> int:
        chance, run = self._machine.chance, self._run
        await self._pass(chance.uniform(0.1, 1.0))
        if self._stops:
            return self._stopped()
        if await self._comes_to_grief():
            return -9
        run.lines.append(self._line(WorkerEventKind.LOADED, self._plan.spec))
        step = int(self._plan.resume.rsplit("-", 1)[-1]) if self._plan.resume else 0
        rows = self._plan.spec.hyperparameters.micro_batch_size or 1
        while step < STEPS:
            await self._pass(chance.uniform(0.05, 0.6))
            if await self._comes_to_grief():
                return -9
            if rows > 1 and chance.random() < 0.2 * self._machine.faults:
                run.exit = RunExit(ok=False, failure=out_of_memory(self._plan.spec))
                return 1
            if chance.random() < 0.2 * self._machine.faults:
                run.exit = RunExit(ok=False, failure=device_failed())
                return 1
            step += 1
            run.lines.append(self._line(WorkerEventKind.PROGRESS, progress(step)))
            if chance.random() < 0.4 and step < STEPS and not await self._save(step):
                return 4
            if self._stops:
                if (run.stop is None or run.stop.save) and not await self._save(step):
                    return 4
                return self._stopped()
        if not await self._save(step):
            return 4
        run.exit = RunExit(ok=True)
        await self._pass(chance.uniform(0.0, 0.2))
        if self._fenced:
            return 4
        run.manifest = manifest(run, checkpoint(run, step, final=True))
        return 0

    async def _save(self, step: int) -> bool:
        """Whether it may still be believed."""
        await self._pass(self._machine.chance.uniform(0.0, 0.3))
        if self._fenced:
            return False
        whole = self._machine.chance.random() >= 0.1 * self._machine.faults
        self._run.checkpoints[step] = whole
        told = checkpoint(self._run, step)
        self._run.lines.append(self._line(WorkerEventKind.CHECKPOINT, told))
        return True

    async def _pass(self, duration_s: float) -> None:
        await asyncio.sleep(duration_s)
        while not self.awake:
            self._waking.clear()
            await self._waking.wait()

    @property
    def _fenced(self) -> bool:
        return self._machine.fence.get(self._run.uid, 0) > self._run.attempt

    @property
    def _stops(self) -> bool:
        return self._run.stop is not None or self.signals > 0

    def _stopped(self) -> int:
        self._run.exit = RunExit(ok=False, stopped=True)
        return 3

    async def _comes_to_grief(self) -> bool:
        if self._machine.chance.random() < 0.2 * self._machine.faults:
            self.hangs = True
            await asyncio.Event().wait()
        return self._fenced or self._machine.chance.random() < self._machine.faults

    def _line(self, kind: WorkerEventKind, payload: JobSpec | Progress | Checkpoint) -> Line:
        number = len(self._run.lines) + 1
        event = WorkerEvent(sequence=number, time_ns=number, kind=kind, payload=NOTHING)
        return Line(number * LINE_BYTES, event, payload)


NOTHING: Mapping[str, object] = {}


def device_failed() -> JobFailure:
    return JobFailure(
        reason=FailureReason.TRAINER_FAILED, message="CUDA error", retryable=True, summary="failed"
    )


def progress(step: int) -> Progress:
    return Progress(
        step=step,
        total_steps=STEPS,
        epoch=step / STEPS,
        tokens_seen=step,
        trained_tokens=step,
        tokens_per_second=1.0,
        loss=1.0 / step,
    )


def checkpoint(run: Run, step: int, *, final: bool = False) -> Checkpoint:
    return Checkpoint(
        step=step,
        folder=f"attempts/{run.attempt}/checkpoints/checkpoint-{step}",
        size_bytes=1,
        sha256=f"{run.attempt}-{step}",
        create_time_ns=1,
        final=final,
        attempt=run.attempt,
        progress=progress(step),
    )


def manifest(run: Run, saved: Checkpoint) -> Manifest:
    return Manifest(
        dataset_sha256="d",
        rows_sha256="r",
        base_model="tiny",
        fingerprints={},
        versions={},
        seed=1,
        device="cpu",
        files={},
        final_loss=1.0,
        effective_spec={},
        checkpoint=saved,
    )


def ending_of(machine: Machine, run: RunFolder, exit_code: int | None) -> Ending:
    """As `trainer/ending.py` judges it from files."""
    mine = machine.run(run)
    if mine.exit is None:
        return lost(run, "died")
    if mine.exit.ok:
        if mine.manifest is not None and mine.checkpoints.get(mine.manifest.checkpoint.step):
            return Finished(mine.manifest)
        return lost(run, "ended, but its result is damaged")
    if mine.exit.failure is not None:
        return Failed(mine.exit.failure)
    found: Lost = lost(run, "was asked to end, and not by the gateway")
    return Stopped(found.failure)
