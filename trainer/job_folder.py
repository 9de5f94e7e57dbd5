"""The folder of one job: its attempts, with their checkpoints and logs.

<jobs>/<uid>/attempts/<n>/    one attempt; see `trainer/run_folder.py`
<jobs>/<uid>/attempt.json     which of them counts; see `trainer/fence.py`
<jobs>/<uid>/initial/         weights to begin with; see `trainer/held_weights.py`
<jobs>/<uid>/deleted.json     its owner deleted it; written before the store forgets it
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from store.artifacts import WEIGHTS_FILE
from store.job_records import JobKey
from trainer.events import Checkpoint
from trainer.run_folder import MANIFEST_FILE, Message, RunFolder, write_whole

DELETED_FILE = "deleted.json"


class Deletion(Message):
    """Says that a folder may be removed once the store does not know its job any more."""

    tenant: str
    job: str


@dataclass(frozen=True, slots=True)
class JobFolder:
    """Paths of one job's folder. All methods block on the disk."""

    path: Path

    def run(self, attempt: int) -> RunFolder:
        return RunFolder(self.path / "attempts" / str(attempt))

    @property
    def initial_weights(self) -> Path:
        return self.path / "initial" / WEIGHTS_FILE

    def checkpoint(self, checkpoint: Checkpoint) -> Path | None:
        """Its folder, if it is still there as it was saved; None if not."""
        folder = (self.path / checkpoint.folder).resolve()
        if not folder.is_relative_to(self.path.resolve()):
            return None
        try:
            manifest = (folder / MANIFEST_FILE).read_bytes()
        except OSError:
            return None
        return folder if hashlib.sha256(manifest).hexdigest() == checkpoint.sha256 else None

    def drop_checkpoints(self, attempts: int) -> None:
        """Remove what all attempts saved."""
        for attempt in range(1, attempts + 1):
            shutil.rmtree(self.run(attempt).checkpoints, ignore_errors=True)

    def mark_deleted(self, key: JobKey) -> None:
        """Write down that the folder goes when the job is gone."""
        if self.path.exists():
            write_whole(self.path / DELETED_FILE, Deletion(tenant=key.tenant, job=key.job))

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)


def deletions(jobs: Path) -> Iterator[tuple[JobFolder, JobKey]]:
    """Folders of deleted jobs that a crash may have left over."""
    for mark in jobs.glob(f"*/{DELETED_FILE}"):
        try:
            deletion = Deletion.model_validate_json(mark.read_bytes())
        except (OSError, ValidationError):
            continue
        yield JobFolder(mark.parent), JobKey(deletion.tenant, deletion.job)
