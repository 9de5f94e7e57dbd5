"""Weights that jobs begin with, kept with each job whatever becomes of where they come from.

    <jobs>/<uid>.new/initial/    held for a job that is being created
    <jobs>/<uid>/initial/        of a job; goes with its folder

They are held before the store knows the job, so that there is none without them; what a crash
leaves in between is settled by the next start. All functions block on the disk.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Collection
from pathlib import Path

from store.artifacts import sync_path
from trainer.checkpoint import sha256_of
from trainer.job_folder import JobFolder

NEW = ".new"
"""Ends the name of a folder whose job the store need not know."""


class WeightsDiffer(ValueError):
    """The file is another one than it should be."""


def hold(jobs: Path, uid: str, source: Path, sha256: str) -> None:
    """Have a file of weights for a job that is about to be created. When this returns it survives
    a power cut, and that the source is deleted.

    Raises WeightsDiffer, FileNotFoundError if the source is gone, and OSError if the disk fails.
    """
    folder = jobs / f"{uid}{NEW}"
    try:
        held = JobFolder(folder).initial_weights
        held.parent.mkdir(parents=True)
        _link(source, held)
        if sha256_of(held) != sha256:  # what is kept is what is compared
            raise WeightsDiffer(str(source))
        for path in (held, held.parent, folder, jobs):
            sync_path(path)
    except BaseException:
        drop(jobs, uid)
        raise


def _link(source: Path, held: Path) -> None:
    """The same file under another name where the disk allows it: adapters and checkpoints are
    never written to again."""
    try:
        os.link(source, held)
    except FileNotFoundError:
        raise
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP):
            raise
        shutil.copyfile(source, held)


def settle(jobs: Path, uid: str) -> None:
    """The job is created: what is held for it is its own. Raises OSError."""
    (jobs / f"{uid}{NEW}").rename(jobs / uid)
    sync_path(jobs)


def drop(jobs: Path, uid: str) -> None:
    """The job was not created after all."""
    shutil.rmtree(jobs / f"{uid}{NEW}", ignore_errors=True)


def unsettled(jobs: Path, but: Collection[str] = ()) -> list[str]:
    """Uids of jobs that were about to be created when a crash came, `but` those that are about
    to be now."""
    found = (folder.name.removesuffix(NEW) for folder in jobs.glob(f"*{NEW}"))
    return [uid for uid in found if uid not in but]
