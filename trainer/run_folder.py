"""The folder of one attempt: all that host and training process say to each other.

    plan.json        host     what to do; see `RunPlan`
    lock             both     held by the process as long as it lives; the host opens it first and
                              hands it on, so there is no moment in which it is not held
    events.ndjson    process  appended to, one `WorkerEvent` a line
    log.txt          process  what it prints
    alive            process  touched every other second: a sign of life, also while it loads
    progress         process  touched when it gets on: after each micro-batch, and while it saves
    stop.json        host     asks it to save and end; see `StopRequest`
    rows/            process  its split of the rows, while it trains
    checkpoints/     process  checkpoint-<step>/, each whole once its manifest.json is there
    borrowed         host     there if an engine has left the device to it; see `trainer/reclaim.py`
    exit.json        process  how it ended; see `RunExit`
    manifest.json    process  where the adapter comes from; written last

There is no pipe between them and no shared memory: either may die, and the other goes on. A run
succeeded if exit.json says so and the files of manifest.json verify; any other end is a loss.
Each attempt has its own folder, so an old process cannot overwrite what a new one wrote; and the
job's folder tells which is the newest, so that an old one ends (`trainer/fence.py`).
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from trainer.events import JobFailure
from trainer.spec import JobSpec

MANIFEST_FILE = "manifest.json"
ADAPTER_FOLDER = "adapter"
"""Of a checkpoint: `adapter_config.json` and `adapter_model.safetensors` as they are served, and
the tokenizer with its chat template."""
REFERENCE_FILE = "reference.json"
"""Of a checkpoint: what the trainer's model says of some rows; see `trainer/reference.py`."""


class Message(BaseModel):
    """Base of the JSON files."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class RunPlan(Message):
    """What a training process is to do."""

    tenant: str
    job: str
    uid: str
    attempt: int
    spec: JobSpec
    """Resolved: every field set."""
    model_path: str
    """Folder of the base model, as it is served."""
    served_dtype: str
    """What the engine computes in, for example `bfloat16`; the adapter is saved in it."""
    fingerprints: Mapping[str, str]
    """Of the base model, by the contract's field names."""
    device: str
    """`cpu`, or the number of a GPU."""
    dataset_sha256: str
    rows: str
    """Path of the prepared rows; see `trainer/rows.py`."""
    eval_rows: str = ""
    """The same of the eval dataset. Empty: a fraction of `rows` is held out."""
    memory_bytes: int = 0
    """What it may take of a GPU; 0: all of it. Always 0 on a CPU, which has no limit to try out."""
    resume: str = ""
    """Folder of the checkpoint to go on from; empty: it begins at the first step."""
    initial_weights: str = ""
    """Path of the weights to begin with, of the digest that `spec.init_from` has; empty: those of
    a new adapter, or of the checkpoint."""


class StopRequest(Message):
    """Asks a training process to end after the micro-batch that runs."""

    save: bool
    """Whether to save a checkpoint, if a step has run."""


class RunExit(Message):
    """How a training process ended."""

    ok: bool
    stopped: bool = False
    """Whether it ended because it was asked to."""
    failure: JobFailure | None = None


@dataclass(frozen=True, slots=True)
class RunFolder:
    """Paths of one attempt's folder, whether it exists or not."""

    path: Path

    @property
    def plan(self) -> Path:
        return self.path / "plan.json"

    @property
    def lock(self) -> Path:
        return self.path / "lock"

    @property
    def events(self) -> Path:
        return self.path / "events.ndjson"

    @property
    def log(self) -> Path:
        return self.path / "log.txt"

    @property
    def alive(self) -> Path:
        return self.path / "alive"

    @property
    def progress(self) -> Path:
        return self.path / "progress"

    @property
    def stop(self) -> Path:
        return self.path / "stop.json"

    @property
    def rows(self) -> Path:
        return self.path / "rows"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def borrowed(self) -> Path:
        return self.path / "borrowed"

    @property
    def exit(self) -> Path:
        return self.path / "exit.json"

    @property
    def manifest(self) -> Path:
        return self.path / MANIFEST_FILE


def write_whole(path: Path, content: Message | BaseModel | Mapping[str, object]) -> None:
    """Write a JSON file so that it is there whole or not at all, also after a power cut."""
    if isinstance(content, BaseModel):
        text = content.model_dump_json()
    else:
        text = json.dumps(content, sort_keys=True)
    new = path.with_name(f"{path.name}.new")
    try:
        with new.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        new.rename(path)
    except BaseException:
        with contextlib.suppress(OSError):
            new.unlink(missing_ok=True)  # a part of it, where the disk is full
        raise
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
