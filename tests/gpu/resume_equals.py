"""Compares a run that was stopped and gone on with to an unbroken one, on a GPU with 8-bit AdamW.

    PYTHONPATH=. python tests/gpu/resume_equals.py [--cpu] [--backend peft]

Needs no network: a small model with random weights. The defaults: 4 bits, bfloat16, dropout, and
AdamW with states in 8 bits. Two unbroken runs show what of a difference is the GPU's own: kernels
need not add in the same order twice. Exits with 1 if the resumed run is further off than TOLERANCE.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from trainer.checkpoint import folder_of, steps_of
from trainer.environment import training_environment
from trainer.events import WorkerEvent, WorkerEventKind
from trainer.run_folder import RunFolder, RunPlan, StopRequest, write_whole
from trainer.spec import Backend, JobSpec

ROOT = Path(__file__).parents[2]
STEPS_AN_EPOCH, STOPPED_AFTER = 40, 6
"""So many are left that the run hears of the stop before its end, also where a step takes 20 ms."""
TOLERANCE = 0.01
"""Of a loss, relative: of a resumed run from an unbroken one, with states in 8 bits."""


def main() -> None:
    """On the device that is asked for."""
    parser = argparse.ArgumentParser(description="Compare a resumed run to an unbroken one.")
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--backend", default="peft", choices=[each.value for each in Backend])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="resume-equals-") as folder:
        compare(Path(folder), "cpu" if options.cpu else "0", Backend(options.backend))


def compare(folder: Path, device: str, backend: Backend) -> None:
    """Train three times in that folder, and print what comes of it."""
    make_model(folder)
    first, _ = train(folder / "first" / "1", folder, device, backend)
    second, _ = train(folder / "second" / "1", folder, device, backend)
    before, run = train(folder / "broken" / "1", folder, device, backend, stop=True)
    saved = steps_of(run)[-1]
    if saved >= len(first):
        sys.exit("the run ended before it heard that it was to stop: raise STEPS_AN_EPOCH")
    after, _ = train(
        folder / "broken" / "2", folder, device, backend, resume=folder_of(run, saved), attempt=2
    )
    resumed = {**{step: loss for step, loss in before.items() if step <= saved}, **after}
    assert list(resumed) == list(first), "every step once"
    print(f"{len(first)} steps, stopped and gone on with after step {saved}, device {device}")
    print("step  unbroken  unbroken, again   resumed")
    for step, loss in first.items():
        print(f"{step:4}  {loss:8.6f}  {second[step]:15.6f}  {resumed[step]:8.6f}")
    largest = 0.0
    for name, other in (("unbroken, again", second), ("resumed", resumed)):
        differences = [abs(other[step] - first[step]) / first[step] for step in first]
        equal, largest = sum(difference == 0 for difference in differences), max(differences)
        print(f"{name}: {equal} losses equal, largest relative difference {largest:.2e}")
    print(f"tolerance: {TOLERANCE:.2e}")
    sys.exit(largest > TOLERANCE)


def make_model(folder: Path) -> None:
    """In another process, so that PyTorch is not in this one."""
    code = (
        "from pathlib import Path; from tests.gpu.random_llama import write_model, write_rows; "
        f"folder = Path({str(folder)!r}); folder.mkdir(parents=True, exist_ok=True); "
        "write_model(folder / 'model', tiny=True); "
        f"write_rows(folder / 'rows', count={8 * STEPS_AN_EPOCH}, tokens=64)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def train(
    path: Path,
    folder: Path,
    device: str,
    backend: Backend,
    *,
    stop: bool = False,
    resume: Path | None = None,
    attempt: int = 1,
) -> tuple[dict[int, float], RunFolder]:
    """Losses by step of one attempt, and its folder."""
    run = RunFolder(path)
    path.mkdir(parents=True)
    write_whole(run.plan, plan_of(folder, device, backend, resume, attempt))
    environment = training_environment(os.environ, run, device)
    others = environment.get("PYTHONPATH", "").split(os.pathsep)
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, others)])
    with run.log.open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "trainer.worker", str(path)],
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    while stop and process.poll() is None and len(losses(run)) < STOPPED_AFTER:
        time.sleep(0.01)
    if stop:
        write_whole(run.stop, StopRequest(save=True))
    if process.wait(300) not in (0, 3):
        sys.exit(run.log.read_text()[-4000:])
    return losses(run), run


def losses(run: RunFolder) -> dict[int, float]:
    """As far as they were told."""
    found: dict[int, float] = {}
    if run.events.exists():
        for line in run.events.read_text().splitlines(keepends=True):
            event = WorkerEvent.model_validate_json(line) if line.endswith("\n") else None
            if event is not None and event.kind is WorkerEventKind.PROGRESS:
                payload: Any = event.payload
                found[payload["step"]] = payload["loss"]
    return found


def plan_of(
    folder: Path, device: str, backend: Backend, resume: Path | None, attempt: int
) -> RunPlan:
    """The recipe's defaults, over two epochs."""
    fields = {
        "dataset": "rows",
        "adapter": "resumed",
        "hyperparameters": {"epochs": 2.0, "fit_micro_batch": False},
        "data": {"max_sequence_tokens": 64, "eval_fraction": 0.0},
        "checkpoints_kept": 100,
    }
    spec = JobSpec.model_validate(fields).resolved(
        base_model="random",
        max_model_len=64,
        served_dtype="bfloat16",
        backend=backend,
        on_gpu=device != "cpu",
    )
    return RunPlan(
        tenant="acme",
        job="resumed-1",
        uid="u1",
        attempt=attempt,
        spec=spec,
        model_path=str(folder / "model"),
        served_dtype="bfloat16",
        fingerprints={},
        device=device,
        dataset_sha256="d" * 64,
        rows=str(folder / "rows"),
        resume="" if resume is None else str(resume),
    )


if __name__ == "__main__":
    main()
