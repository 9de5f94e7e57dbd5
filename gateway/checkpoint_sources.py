"""Checkpoints of training jobs as sources of adapter versions.

    train:UID/ATTEMPT/STEP  <->  JOBS/UID/attempts/ATTEMPT/checkpoints/checkpoint-STEP/

The text is kept with the version, and has no path of this machine in it. Callers cannot name it
(`gateway/adapter_codec.py`); a checkpoint becomes a version by its job alone.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from trainer.run_folder import ADAPTER_FOLDER

TRAIN_SCHEME = "train:"
"""What stands before the rest of a checkpoint's URI, and before request ids of publications."""

_REST = re.compile(r"([A-Za-z0-9_-]{1,64})/([0-9]{1,9})/([0-9]{1,9})")
_BELOW_JOBS = re.compile(
    r"([A-Za-z0-9_-]{1,64})/attempts/([0-9]{1,9})/checkpoints/checkpoint-([0-9]{1,9})"
)


@dataclass(frozen=True, slots=True)
class CheckpointSources:
    """Where checkpoints lie."""

    jobs: Path
    """Folder of all jobs, each by its uid."""

    def uri(self, checkpoint: Path) -> str:
        """What a version says of where it comes from. Raises ValueError elsewhere. Blocks on the
        disk, where either path may be told through a link."""
        below = checkpoint.resolve().relative_to(self.jobs.resolve())
        found = _BELOW_JOBS.fullmatch(below.as_posix())
        if found is None:
            raise ValueError(f"{checkpoint} is no checkpoint of a job")
        return f"{TRAIN_SCHEME}{found[1]}/{found[2]}/{found[3]}"

    def checkpoint(self, uri: str) -> Path:
        """The folder that `uri` made this of. Raises ValueError for another text."""
        return self._folder(uri.removeprefix(TRAIN_SCHEME))

    def adapter(self, rest: str) -> Path:
        """The adapter's folder, by what stands after the scheme. Raises ValueError as above."""
        return self._folder(rest) / ADAPTER_FOLDER

    def _folder(self, rest: str) -> Path:
        found = _REST.fullmatch(rest)
        if found is None:
            raise ValueError(f"{rest!r} names no checkpoint")
        attempts = self.jobs / found[1] / "attempts"
        return attempts / found[2] / "checkpoints" / f"checkpoint-{found[3]}"
