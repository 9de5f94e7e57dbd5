"""A training process that trains nothing, and speaks the run folder's contract.

    python scripted_worker.py RUN_FOLDER

What it is to do, and to do wrong, stands in `<root>/scripts/<job>.json`; see `Script`.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from pydantic import BaseModel

from trainer.checkpoint import seal
from trainer.events import (
    Checkpoint,
    FailureReason,
    JobFailure,
    Manifest,
    Progress,
    WorkerEvent,
    WorkerEventKind,
)
from trainer.ingest import as_json
from trainer.run_folder import ADAPTER_FOLDER, RunExit, RunFolder, RunPlan, StopRequest, write_whole


class Script(BaseModel):
    """What the process does."""

    load_s: float = 0.0
    steps: int = 3
    step_s: float = 0.0
    save_each: bool = False
    save_s: float = 0.0
    say: str = ""
    """Printed at the start."""
    die_at: int = -1
    """The step before which it sends itself `die_signal`; 0: before it has loaded."""
    die_signal: int = signal.SIGKILL
    exit_at: int = -1
    """The step before which it ends with exit code 7."""
    fail: FailureReason | None = None
    deaf: bool = False
    """Does not look for stop.json."""
    unkillable: bool = False
    """Does not hear SIGTERM."""
    child: bool = False
    """Starts a process that sleeps, and leaves it behind."""
    fork: bool = False
    """Forks a process that sleeps, and has all that it has."""
    rubbish: str = ""
    """Written into the event file before the first step."""
    torn: bool = False
    """Writes its first progress in two halves."""
    nan: bool = False
    evaluate: bool = False
    """Ends its steps with an evaluation, as a run does that holds out rows."""
    damage: bool = False
    """The saved adapter is not what the manifest says."""
    linger_s: float = 0.0
    """How long it takes to end once it has said all."""
    wait_for: str = ""
    """A file that has to be there before it ends."""


class Worker:
    def __init__(self, run: RunFolder) -> None:
        self.run = run
        self.plan = RunPlan.model_validate_json(run.plan.read_bytes())
        self.root = run.path.parents[3]
        script = self.root / "scripts" / f"{self.plan.job}.json"
        self.script = Script.model_validate_json(script.read_bytes() if script.exists() else b"{}")
        self.events = run.events.open("ab", buffering=0)
        self.sequence = 0
        self.signals = 0
        signal.signal(signal.SIGTERM, self.hear)

    def hear(self, *_: object) -> None:
        if self.script.unkillable:
            return
        self.signals += 1
        if self.run.stop.exists() or self.signals > 1:
            os._exit(143)

    def tell(self, kind: WorkerEventKind, payload: BaseModel, *, torn: bool = False) -> None:
        self.sequence += 1
        event = WorkerEvent(
            sequence=self.sequence, time_ns=time.time_ns(), kind=kind, payload=as_json(payload)
        )
        line = event.model_dump_json().encode() + b"\n"
        if torn:
            self.events.write(line[:20])
            time.sleep(0.5)
            line = line[20:]
        self.events.write(line)

    def tell_progress(self, step: int, *, torn: bool = False, **values: float) -> None:
        progress = Progress(
            step=step,
            total_steps=self.script.steps,
            epoch=step / self.script.steps,
            tokens_seen=100 * step,
            trained_tokens=50 * step,
            tokens_per_second=100.0,
            elapsed_s=float(step),
            **values,
        )
        self.tell(WorkerEventKind.PROGRESS, progress, torn=torn)

    def main(self) -> int:
        script = self.script
        print(script.say or "training", flush=True)
        self.run.alive.touch()
        if script.child:
            subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        if script.fork and os.fork() == 0:
            time.sleep(600)
            os._exit(0)
        self.pause(script.load_s)
        self.perhaps_die(0)
        self.tell(WorkerEventKind.LOADED, self.plan.spec)
        if script.rubbish:
            self.events.write(script.rubbish.encode() + b"\n")
        step = 0
        for step in range(1, script.steps + 1):
            self.perhaps_die(step)
            time.sleep(script.step_s)
            self.run.alive.touch()
            loss = float("nan") if script.nan else 1.0 / step
            self.tell_progress(step, torn=script.torn and step == 1, loss=loss)
            if script.save_each and step < script.steps:
                self.save(step, final=False)
            if self.stop_requested():
                return self.stop(step)
        if script.evaluate:
            self.tell_progress(step, eval_loss=0.75)
        if script.fail is not None:
            failure = JobFailure(reason=script.fail, message="it is what the script says")
            write_whole(self.run.exit, RunExit(ok=False, failure=failure))
            return 1
        while script.wait_for and not (self.root / script.wait_for).exists():
            time.sleep(0.02)
        self.finish(self.save(step, final=True))
        time.sleep(script.linger_s)
        return 0

    def pause(self, seconds: float) -> None:
        end_s = time.monotonic() + seconds
        while time.monotonic() < end_s:
            time.sleep(0.02)
            if self.stop_requested():
                write_whole(self.run.exit, RunExit(ok=False, stopped=True))
                sys.exit(3)

    def perhaps_die(self, step: int) -> None:
        if step == self.script.die_at:
            os.kill(os.getpid(), self.script.die_signal)
            time.sleep(10)
        if step == self.script.exit_at:
            os._exit(7)

    def stop_requested(self) -> bool:
        return not self.script.deaf and (self.run.stop.exists() or self.signals > 0)

    def stop(self, step: int) -> int:
        request = StopRequest.model_validate_json(self.run.stop.read_bytes())
        if request.save:
            self.save(step, final=False)
        write_whole(self.run.exit, RunExit(ok=False, stopped=True))
        return 3

    def save(self, step: int, *, final: bool) -> Checkpoint:
        folder = self.run.checkpoints / f"checkpoint-{step}"
        (folder / ADAPTER_FOLDER).mkdir(parents=True, exist_ok=True)
        (folder / ADAPTER_FOLDER / "adapter_config.json").write_text("{}")
        (folder / ADAPTER_FOLDER / "adapter_model.safetensors").write_bytes(b"%d" % step)
        time.sleep(self.script.save_s)
        manifest = seal(folder, step, None)
        if self.script.damage:
            (folder / ADAPTER_FOLDER / "adapter_model.safetensors").write_bytes(b"other")
        checkpoint = Checkpoint(
            step=step,
            folder=folder.relative_to(self.run.path.parents[1]).as_posix(),
            size_bytes=manifest.size_bytes,
            sha256=hashlib.sha256((folder / "manifest.json").read_bytes()).hexdigest(),
            create_time_ns=manifest.create_time_ns,
            final=final,
        )
        self.adapter_files = manifest.adapter_files
        self.tell(WorkerEventKind.CHECKPOINT, checkpoint)
        return checkpoint

    def finish(self, checkpoint: Checkpoint) -> None:
        write_whole(self.run.exit, RunExit(ok=True))
        write_whole(
            self.run.manifest,
            Manifest(
                dataset_sha256=self.plan.dataset_sha256,
                rows_sha256="0" * 64,
                base_model=self.plan.spec.base_model,
                fingerprints=self.plan.fingerprints,
                versions={},
                seed=1,
                device=self.plan.device,
                files=self.adapter_files,
                final_loss=0.5,
                effective_spec=json.loads(self.plan.spec.model_dump_json()),
                checkpoint=checkpoint,
            ),
        )


if __name__ == "__main__":
    sys.exit(Worker(RunFolder(Path(sys.argv[1]))).main())
