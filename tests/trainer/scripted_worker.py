"""A training process that trains nothing, and speaks the run folder's contract.

    python scripted_worker.py RUN_FOLDER

What it is to do, and to do wrong, stands in `<root>/scripts/<job>.json`; see `Script`.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from pydantic import BaseModel

from tests.trainer.small_adapter import config_of, tensors_of, write_tensors
from trainer.checkpoint import as_checkpoint, seal, verify
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
from trainer.fence import Fence
from trainer.ingest import as_json
from trainer.run_folder import ADAPTER_FOLDER, RunExit, RunFolder, RunPlan, StopRequest, write_whole


class Script(BaseModel):
    """What the process does."""

    load_s: float = 0.0
    steps: int = 3
    step_s: float = 0.0
    save_each: bool = False
    save_at: int = -1
    """The step after which it saves."""
    save_s: float = 0.0
    say: str = ""
    """Printed at the start."""
    die_at: int = -1
    """The step before which it sends itself `die_signal`; 0: before it has loaded."""
    die_after: int = 0
    """After how many steps of each attempt it does so; 0: never."""
    die_signal: int = signal.SIGKILL
    exit_at: int = -1
    """The step before which it ends with `exit_code`."""
    exit_code: int = 7
    fail: FailureReason | None = None
    fail_retryable: bool = False
    memory_rows: int = 0
    """Rows at once above which memory does not do; 0: any number does, -1: none does."""
    memory_from: int = 1
    """The step from which on that is so."""
    well_from: int = 0
    """The attempt from which on it neither dies, exits, fails nor hangs; 0: none."""
    hang_at: int = -1
    """The step before which it does nothing any more; 0: before it has loaded."""
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
        well = 0 < self.script.well_from <= self.plan.attempt
        if well:
            wrong = {"die_at": -1, "exit_at": -1, "hang_at": -1, "fail": None}
            self.script = self.script.model_copy(update=wrong)
        self.fence = Fence(run, self.plan.attempt)
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
        self.progress = Progress(
            step=step,
            total_steps=self.script.steps,
            epoch=step / self.script.steps,
            tokens_seen=100 * step,
            trained_tokens=50 * step,
            tokens_per_second=100.0,
            elapsed_s=float(step),
            **values,
        )
        self.tell(WorkerEventKind.PROGRESS, self.progress, torn=torn)
        self.run.progress.touch()

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
        step = begun = self.resumed()
        for step in range(begun + 1, script.steps + 1):
            self.perhaps_die(step)
            if step - begun == script.die_after + 1 and script.die_after:
                self.die()
            if step >= script.memory_from and self.too_many_rows():
                return 1
            time.sleep(script.step_s)
            self.run.alive.touch()
            loss = float("nan") if script.nan else 1.0 / step
            self.tell_progress(step, torn=script.torn and step == 1, loss=loss)
            if (script.save_each or script.save_at == step) and step < script.steps:
                self.save(step, final=False)
            if self.stop_requested():
                return self.stop(step)
        if script.evaluate:
            self.tell_progress(step, eval_loss=0.75)
        if script.fail is not None:
            failure = JobFailure(
                reason=script.fail,
                message="it is what the script says",
                retryable=script.fail_retryable,
            )
            write_whole(self.run.exit, RunExit(ok=False, failure=failure))
            return 1
        while script.wait_for and not (self.root / script.wait_for).exists():
            time.sleep(0.02)
        self.finish(self.save(step, final=True))
        time.sleep(script.linger_s)
        return 0

    def resumed(self) -> int:
        """The step that it goes on from."""
        if not self.plan.resume:
            return 0
        manifest = verify(Path(self.plan.resume))
        assert manifest.progress is not None
        self.progress = manifest.progress
        return manifest.step

    def too_many_rows(self) -> bool:
        rows = self.plan.spec.hyperparameters.micro_batch_size or 0
        if not self.script.memory_rows or rows <= self.script.memory_rows:
            return False
        failure = out_of_memory(self.plan.spec)
        write_whole(self.run.exit, RunExit(ok=False, failure=failure))
        return True

    def pause(self, seconds: float) -> None:
        end_s = time.monotonic() + seconds
        while time.monotonic() < end_s:
            time.sleep(0.02)
            if self.stop_requested():
                write_whole(self.run.exit, RunExit(ok=False, stopped=True))
                sys.exit(3)

    def perhaps_die(self, step: int) -> None:
        if step == self.script.die_at:
            self.die()
        if step == self.script.exit_at:
            os._exit(self.script.exit_code)
        while step == self.script.hang_at:
            time.sleep(600)

    def die(self) -> None:
        os.kill(os.getpid(), self.script.die_signal)
        time.sleep(10)

    def stop_requested(self) -> bool:
        return not self.script.deaf and (self.run.stop.exists() or self.signals > 0)

    def stop(self, step: int) -> int:
        asked = self.run.stop.exists()  # else it was a signal alone
        if not asked or StopRequest.model_validate_json(self.run.stop.read_bytes()).save:
            self.save(step, final=False)
        write_whole(self.run.exit, RunExit(ok=False, stopped=True))
        return 3

    def save(self, step: int, *, final: bool) -> Checkpoint:
        folder = self.run.checkpoints / f"checkpoint-{step}"
        (folder / ADAPTER_FOLDER).mkdir(parents=True, exist_ok=True)
        lora = self.plan.spec.lora
        assert lora.r is not None
        config = config_of(
            *(lora.target_modules, lora.r),
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            use_rslora=lora.use_rslora,
        )
        (folder / ADAPTER_FOLDER / "adapter_config.json").write_text(config)
        tensors = tensors_of(lora.target_modules, lora.r)
        write_tensors(folder / "adapter_model.safetensors", tensors, seed=step)
        (folder / ADAPTER_FOLDER / "adapter_model.safetensors").write_bytes(b"%d" % step)
        time.sleep(self.script.save_s)
        if not self.fence.holds:
            os._exit(9)
        manifest = seal(folder, step, None, self.progress)
        if self.script.damage:
            (folder / ADAPTER_FOLDER / "adapter_model.safetensors").write_bytes(b"other")
        checkpoint = as_checkpoint(folder, manifest, self.plan.attempt, final=final)
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
