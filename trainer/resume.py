"""Which checkpoint a job goes on from: the newest of all its attempts that is whole."""

from __future__ import annotations

import logging

from trainer.checkpoint import (
    CheckpointCorrupt,
    as_checkpoint,
    folder_of,
    steps_of,
    verify,
)
from trainer.events import Checkpoint
from trainer.job_folder import JobFolder

logger = logging.getLogger(__name__)


def newest_checkpoint(folder: JobFolder, attempts: int) -> Checkpoint | None:
    """The newest that verifies and can be gone on from; None: there is none.

    Blocks: it reads all files of it. A later attempt's is newer, whatever its step: it went on
    from what was whole of the earlier ones.
    """
    for attempt in range(attempts, 0, -1):
        run = folder.run(attempt)
        for step in reversed(steps_of(run)):
            path = folder_of(run, step)
            try:
                manifest = verify(path)
            except CheckpointCorrupt as error:
                logger.warning("%s is not gone on from: %s", path, error)
                continue
            if manifest.resumable:
                return as_checkpoint(path, manifest, attempt)
    return None
