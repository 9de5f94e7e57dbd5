"""Checkpoints that prove that they are whole: a manifest of all files, written last."""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from trainer.events import Checkpoint, Manifest, Progress
from trainer.run_folder import ADAPTER_FOLDER, MANIFEST_FILE, RunFolder, write_whole

PREFIX = "checkpoint-"


class CheckpointCorrupt(ValueError):
    """A checkpoint is not whole, or not what was saved."""


class CheckpointManifest(BaseModel):
    """The files of one checkpoint."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    step: int
    files: Mapping[str, str]
    """SHA-256, lower-case hex, by path below the checkpoint's folder."""
    size_bytes: int
    eval_loss: float | None = None
    """Measured last before."""
    create_time_ns: int
    progress: Progress | None = None
    """Where the run stood; None: a release saved it that could not go on from it."""
    evaluation_owed: bool = False
    """Whether the run was asked to end before the evaluation that comes after this step."""

    @property
    def resumable(self) -> bool:
        """Whether a run can go on from it."""
        return self.progress is not None

    @property
    def adapter_files(self) -> dict[str, str]:
        """SHA-256 of the adapter's files by their names."""
        prefix = f"{ADAPTER_FOLDER}/"
        return {
            name.removeprefix(prefix): digest
            for name, digest in self.files.items()
            if name.startswith(prefix)
        }


def folder_of(run: RunFolder, step: int) -> Path:
    """Where the checkpoint of a step is, or would be."""
    return run.checkpoints / f"{PREFIX}{step}"


def is_sealed(folder: Path) -> bool:
    """Whether a checkpoint was finished. `verify` tells whether it is still what it was."""
    return (folder / MANIFEST_FILE).is_file()


def seal(
    folder: Path,
    step: int,
    eval_loss: float | None,
    progress: Progress | None = None,
    *,
    evaluation_owed: bool = False,
) -> CheckpointManifest:
    """Make a checkpoint's files durable, and then write the manifest that says so.

    `progress` is where the run stands, if it can go on from there. `evaluation_owed` as the
    manifest has it.
    """
    files = {}
    size_bytes = 0
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        _sync(path)
        files[path.relative_to(folder).as_posix()] = sha256_of(path)
        size_bytes += path.stat().st_size
    for inner in [path for path in folder.rglob("*") if path.is_dir()]:
        _sync(inner)
    manifest = CheckpointManifest(
        step=step,
        files=files,
        size_bytes=size_bytes,
        eval_loss=eval_loss,
        create_time_ns=time.time_ns(),
        progress=progress,
        evaluation_owed=evaluation_owed,
    )
    write_whole(folder / MANIFEST_FILE, manifest)
    _sync(folder.parent)
    return manifest


def verify(folder: Path) -> CheckpointManifest:
    """Read every file of a checkpoint again. Files that the manifest does not name are let be.

    Raises CheckpointCorrupt if it has no manifest, or a file is gone or another.
    """
    try:
        manifest = CheckpointManifest.model_validate_json((folder / MANIFEST_FILE).read_bytes())
    except FileNotFoundError as error:
        raise CheckpointCorrupt(f"{folder.name} was not finished: it has no manifest") from error
    except ValidationError as error:
        raise CheckpointCorrupt(f"{folder.name} has a manifest that cannot be read") from error
    for name, digest in manifest.files.items():
        if not (folder / name).resolve().is_relative_to(folder.resolve()):
            raise CheckpointCorrupt(f"{folder.name} has a manifest that names {name!r}")
        try:
            found = sha256_of(folder / name)
        except OSError as error:
            raise CheckpointCorrupt(f"{folder.name} has lost its {name}") from error
        if found != digest:
            raise CheckpointCorrupt(f"{folder.name} has another {name} than was saved")
    return manifest


def as_checkpoint(
    folder: Path, manifest: CheckpointManifest, attempt: int, *, final: bool = False
) -> Checkpoint:
    """A sealed checkpoint of an attempt as it is told of."""
    return Checkpoint(
        step=manifest.step,
        folder=f"attempts/{attempt}/{folder.parent.name}/{folder.name}",
        size_bytes=manifest.size_bytes,
        sha256=sha256_of(folder / MANIFEST_FILE),
        eval_loss=manifest.eval_loss,
        create_time_ns=manifest.create_time_ns,
        final=final,
        attempt=attempt,
        progress=manifest.progress,
    )


def verified_manifest(run: RunFolder) -> Manifest:
    """What a run made, once its checkpoint is verified. Raises CheckpointCorrupt."""
    try:
        text = run.manifest.read_bytes()
        manifest = Manifest.model_validate_json(text)
    except (OSError, ValidationError) as error:
        raise CheckpointCorrupt("the run has no manifest that can be read") from error
    saved = verify(folder_of(run, manifest.checkpoint.step))
    if saved.adapter_files != dict(manifest.files):
        raise CheckpointCorrupt("the run's manifest names another adapter than its checkpoint has")
    return manifest.model_copy(update={"sha256": hashlib.sha256(text).hexdigest()})


def steps_of(run: RunFolder) -> list[int]:
    """Steps with a finished checkpoint, oldest first."""
    found = []
    if run.checkpoints.is_dir():
        for folder in run.checkpoints.iterdir():
            step = folder.name.removeprefix(PREFIX)
            if folder.name.startswith(PREFIX) and step.isdigit() and is_sealed(folder):
                found.append(int(step))
    return sorted(found)


def drop_oldest(run: RunFolder, kept: int, spared: Iterable[int] = ()) -> None:
    """Remove finished checkpoints until the newest `kept` are left, and those spared."""
    for step in sorted(set(steps_of(run)[:-kept]) - set(spared)):
        remove(folder_of(run, step))


def drop_earlier(run: RunFolder, attempt: int, kept: int) -> None:
    """Remove what attempts before this one of the run saved, but for the newest that make up
    `kept` with its own."""
    left = kept - len(steps_of(run))
    for number in range(attempt - 1, 0, -1):
        earlier = RunFolder(run.path.with_name(str(number)))
        steps = steps_of(earlier)
        for step in steps[: max(0, len(steps) - max(0, left))]:
            remove(folder_of(earlier, step))
        left -= len(steps)


def adopt(run: RunFolder, folder: Path) -> Path:
    """Make the checkpoint of an earlier attempt one of this run, whole or not at all. Its files
    stay one with the earlier one's."""
    own = run.checkpoints / folder.name
    new = own.with_name(f"{own.name}.new")
    shutil.copytree(folder, new, copy_function=os.link)
    new.rename(own)
    _sync(run.checkpoints)
    return own


def remove(folder: Path) -> None:
    """Remove a checkpoint; cut off in the middle, it leaves none that looks whole."""
    (folder / MANIFEST_FILE).unlink(missing_ok=True)
    shutil.rmtree(folder)


def remove_unfinished(run: RunFolder) -> None:
    """Remove what a run that has ended leaves over: its split of the rows, and what saving has
    left that failed. It takes room, and nobody can use it."""
    shutil.rmtree(run.rows, ignore_errors=True)
    if run.checkpoints.is_dir():
        for folder in run.checkpoints.iterdir():
            if not is_sealed(folder):
                shutil.rmtree(folder, ignore_errors=True)


def sha256_of(path: Path) -> str:
    """Of a file, as lower-case hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
