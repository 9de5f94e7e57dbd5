"""The trainer's code on the simulated machine: what reaches files and processes reaches that."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from store import device_use
from tests.trainer.simulation.fairness import ADVANCE_S, AGEING_S, HALF_LIFE_S
from tests.trainer.simulation.host import HOST
from tests.trainer.simulation.machine import Machine, Process, ending_of
from tests.trainer.simulation.virtual_loop import VirtualLoop
from trainer import attempt, device_shares, fair_order, job_process, means, recovery
from trainer.admission import Admission
from trainer.devices import DeviceFacts
from trainer.event_file import Line
from trainer.events import Checkpoint
from trainer.job_folder import JobFolder
from trainer.run_folder import RunFolder, RunPlan, StopRequest
from trainer.spec import Backend, JobSpec
from trainer.watchdog import Signs, Watchdog


@dataclass
class Ground:
    """Where the code stands now: one machine at a time."""

    machine: Machine | None = None

    @property
    def there(self) -> Machine:
        assert self.machine is not None
        return self.machine


@dataclass(frozen=True)
class Lock:
    """The file of a run's lock."""

    ground: Ground
    run: RunFolder

    def exists(self) -> bool:
        return self.ground.there.run(self.run).locked


def put(patch: pytest.MonkeyPatch, ground: Ground, loop: VirtualLoop) -> None:
    """For as long as the patch lasts."""

    class Handle:
        """In the place of `TrainingProcess`."""

        def __init__(self, process: Process) -> None:
            self._process = process
            self._host = HOST.get()

        @classmethod
        def start(
            cls, run: RunFolder, command: Sequence[str], environment: Mapping[str, str]
        ) -> Handle:
            plan = ground.there.run(run).plan
            assert plan is not None
            return cls(ground.there.start(run, plan))

        @classmethod
        def find(cls, run: RunFolder) -> Handle | None:
            process = ground.there.run(run).process
            return cls(process) if process is not None and process.lives else None

        @property
        def running(self) -> bool:
            return self._process.lives

        @property
        def exit_code(self) -> int | None:
            return self._process.exit_code

        def terminate(self) -> None:
            if self._host is None or not self._host.dead:
                self._process.terminate()

        def close(self) -> None:
            """It goes on."""

    def write(path: Path, content: Any) -> None:
        run = ground.there.run(RunFolder(path.parent))
        if isinstance(content, RunPlan):
            run.plan = content
        else:
            assert isinstance(content, StopRequest)
            run.stop = content

    def said_last(run: RunFolder) -> bool:
        mine = ground.there.run(run)
        return mine.manifest is not None or (mine.exit is not None and not mine.exit.ok)

    def read(path: Path, offset: int) -> list[Line]:
        lines = ground.there.run(RunFolder(path.parent)).lines
        return [line for line in lines if line.end > offset][:3]

    def raise_fence(run: RunFolder, number: int) -> None:
        ground.there.fence[run.path.parents[1].name] = number

    def newest(folder: JobFolder, attempts: int) -> Checkpoint | None:
        return ground.there.newest(folder.path.name, attempts)

    def show(run: RunFolder) -> Signs:
        mine = ground.there.run(run)
        trains = len(mine.lines) > 1
        hangs = mine.process is not None and mine.process.hangs
        return Signs(
            0 if hangs else round(loop.time() * 1e9), len(mine.lines) * trains, len(mine.lines)
        )

    def drop(folder: JobFolder, attempts: int) -> None:
        for run in ground.there.runs.values():
            if run.uid == folder.path.name and run.attempt <= attempts:
                run.checkpoints.clear()

    resolved: dict[JobSpec, JobSpec] = {}

    async def resolve(self: Admission, tenant: str, spec: JobSpec) -> JobSpec:
        if spec not in resolved:
            resolved[spec] = spec.resolved(
                base_model="tiny",
                max_model_len=2048,
                served_dtype="float32",
                backend=Backend.PEFT,
                on_gpu=False,
            )
        return resolved[spec]

    patch.setattr(attempt, "TrainingProcess", Handle)
    patch.setattr(attempt, "write_whole", write)
    patch.setattr(attempt, "said_last", said_last)
    patch.setattr(attempt, "read_events", read)
    patch.setattr(attempt, "raise_fence", raise_fence)
    patch.setattr(attempt, "signs", show)
    patch.setattr(attempt, "kill_all", lambda run: ground.there.kill(run))
    patch.setattr(attempt, "is_locked", lambda run: ground.there.run(run).lives)
    patch.setattr(attempt, "ending", lambda run, code: ending_of(ground.there, run, code))
    patch.setattr(attempt, "POLL_INTERVAL_S", 1.0)
    patch.setattr(job_process, "newest_checkpoint", newest)
    patch.setattr(job_process, "remove_unfinished", lambda run: None)
    patch.setattr(job_process, "Watchdog", functools.partial(Watchdog, clock_s=loop.time))
    patch.setattr(means, "device_facts", lambda device: DeviceFacts(2**30, 2**30, True))
    patch.setattr(recovery, "BACKOFF_S", 0.5)
    patch.setattr(fair_order, "AGEING_S", AGEING_S)
    patch.setattr(fair_order, "ADVANCE_S", ADVANCE_S)
    patch.setattr(device_shares, "ADVANCE_S", ADVANCE_S)
    patch.setattr(device_use, "HALF_LIFE_S", HALF_LIFE_S)
    patch.setattr(Admission, "resolve", resolve)
    patch.setattr(RunFolder, "lock", property(lambda run: Lock(ground, run)))
    patch.setattr(JobFolder, "checkpoint", lambda folder, saved: folder.path / saved.folder)
    patch.setattr(JobFolder, "drop_checkpoints", drop)
