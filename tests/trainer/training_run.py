"""Real training processes on the tiny model, for tests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from engine.base_model import fingerprints
from trainer.environment import training_environment
from trainer.events import WorkerEvent, WorkerEventKind
from trainer.rows import IGNORED, ROWS_FILE
from trainer.run_folder import RunExit, RunFolder, RunPlan, StopRequest, write_whole
from trainer.spec import Backend, JobSpec

ROOT = Path(__file__).parents[2]
VOCABULARY = 1024
END_S = 240.0
"""No training process of a test takes so long, also on a busy machine."""


@dataclass(frozen=True, slots=True)
class Ended:
    """A training process that has ended."""

    run: RunFolder
    code: int
    seconds: float

    @property
    def exit(self) -> RunExit:
        return RunExit.model_validate_json(self.run.exit.read_bytes())

    @property
    def log(self) -> str:
        return self.run.log.read_text(errors="replace")

    @property
    def events(self) -> list[WorkerEvent]:
        lines = self.run.events.read_text().splitlines()
        return [WorkerEvent.model_validate_json(line) for line in lines]

    def payloads(self, kind: WorkerEventKind) -> list[Any]:
        return [event.payload for event in self.events if event.kind is kind]

    @property
    def steps(self) -> list[Any]:
        """Progress of each step."""
        progress = self.payloads(WorkerEventKind.PROGRESS)
        return [payload for payload in progress if payload["loss"] is not None]

    @property
    def losses(self) -> list[float]:
        return [payload["loss"] for payload in self.steps]

    @property
    def effective(self) -> JobSpec:
        [payload] = self.payloads(WorkerEventKind.LOADED)
        return JobSpec.model_validate(payload)

    @property
    def notices(self) -> dict[str, str]:
        found = self.payloads(WorkerEventKind.NOTICE)
        return {notice["code"]: notice["message"] for notice in found}


@dataclass(slots=True)
class Running:
    """A training process."""

    run: RunFolder
    process: subprocess.Popen[bytes]
    began_s: float = field(default_factory=time.monotonic)

    def kill(self) -> None:
        """End it, if it has not."""
        self.process.kill()
        self.process.wait()

    def wait(self) -> Ended:
        code = self.process.wait(END_S)
        return Ended(self.run, code, time.monotonic() - self.began_s)

    def wait_until(self, true: Callable[[], bool]) -> None:
        """Until something holds. Fails if the process ends before."""
        deadline_s = time.monotonic() + END_S
        while not true():
            assert self.process.poll() is None, self.run.log.read_text()[-3000:]
            assert time.monotonic() < deadline_s
            time.sleep(0.02)

    def wait_for_step(self, step: int) -> None:
        self.wait_until(lambda: f'"step":{step},' in read(self.run.events))

    def stop(self, *, save: bool) -> None:
        write_whole(self.run.stop, StopRequest(save=save))


STARTED: list[Running] = []
"""Those that are to be looked after: a test that fails leaves one running."""


def read(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def write_rows(folder: Path, count: int = 24, *, seed: int = 1, longest: int = 40) -> Path:
    """Prepared rows of a little arithmetic, of differing lengths; two thirds are trained on."""
    folder.mkdir(parents=True)
    input_ids, labels = [], []
    for row in range(count):
        length = 6 + (row * 7 + seed) % (longest - 5)
        ids = [
            3 + (row * 31 + at * (row % 5 + 1) + seed) % (VOCABULARY - 3) for at in range(length)
        ]
        prompt = length // 3
        input_ids.append(ids)
        labels.append([IGNORED] * prompt + ids[prompt:])
    columns = {
        "line": pa.array(range(1, count + 1), pa.int64()),
        "input_ids": pa.array(input_ids, pa.list_(pa.int32())),
        "labels": pa.array(labels, pa.list_(pa.int32())),
    }
    pq.write_table(pa.table(columns), folder / ROWS_FILE)
    return folder


def resolved(fields: Mapping[str, Any], backend: Backend = Backend.PEFT) -> JobSpec:
    """A spec as the host resolves it for a server of the tiny model on a CPU."""
    spec = JobSpec.model_validate({"dataset": "letters", "adapter": "pirate", **fields})
    return spec.resolved(
        base_model="tiny",
        max_model_len=512,
        served_dtype="float32",
        backend=backend,
        on_gpu=False,
    )


def start(
    folder: Path,
    model: Path,
    rows: Path,
    fields: Mapping[str, Any] | None = None,
    *,
    backend: Backend = Backend.PEFT,
    served_dtype: str = "float32",
    memory_bytes: int = 0,
    eval_rows: str = "",
    environment: Mapping[str, str] = os.environ,
    resume: str = "",
    initial: Path | None = None,
    attempt: int = 1,
    prepare: Callable[[RunFolder], None] = lambda run: None,
) -> Running:
    """Start a training process in a folder of its own."""
    run = RunFolder(folder)
    folder.mkdir(parents=True)
    plan = RunPlan(
        tenant="acme",
        job="pirate-1",
        uid="u1",
        attempt=attempt,
        spec=resolved(fields or {}, backend),
        model_path=str(model),
        served_dtype=served_dtype,
        fingerprints=asdict(fingerprints(model)) if model.exists() else {},
        device="cpu",
        dataset_sha256="d" * 64,
        rows=str(rows),
        eval_rows=eval_rows,
        memory_bytes=memory_bytes,
        resume=resume,
        initial_weights=str(initial or ""),
    )
    write_whole(run.plan, plan)
    prepare(run)
    own = training_environment(environment, run, "cpu")
    with run.log.open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "trainer.worker", str(folder)],
            cwd=folder,
            env={**own, "PYTHONPATH": str(ROOT)},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    STARTED.append(Running(run, process))
    return STARTED[-1]


def adapter_config(checkpoint: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads(
        (checkpoint / "adapter" / "adapter_config.json").read_text()
    )
    return config
