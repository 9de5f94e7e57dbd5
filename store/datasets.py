"""Files of datasets, immutable and addressed by their content.

    <root>/datasets/<sha256>/data.jsonl     never written again
    <root>/datasets/.scratch/               being made or removed; swept at the next start

Uploads of one file by several tenants, or under several names, are one file here.

The root must be held by a `StateFolder`. Everything here blocks on the disk; call it in a thread.
"""

from __future__ import annotations

import errno
import os
import shutil
import uuid
from collections.abc import Collection
from pathlib import Path

from store.artifacts import FOLDER_MODE, SEALED_FILE_MODE, SEALED_FOLDER_MODE, sync_path
from store.records import DIGEST
from store.upload_folder import DATASET_FILE, full_disk_is_said

_SCRATCH = ".scratch"


class DatasetFiles:
    """All dataset files below one root. Construction sweeps what was never made or half removed.

    The caller sees to it that nobody keeps a file while it is removed. Methods raise ValueError
    for what is no SHA-256, and OSError if the disk fails.
    """

    def __init__(self, root: Path) -> None:
        self._root = root.resolve() / "datasets"
        self._scratch = self._root / _SCRATCH
        self._scratch.mkdir(mode=FOLDER_MODE, parents=True, exist_ok=True)
        sync_path(root.resolve())  # or a power cut takes what is synced below with the name
        for leftover in self._scratch.iterdir():
            shutil.rmtree(leftover)

    def path(self, sha256: str) -> Path:
        """The file, whether it exists or not."""
        return self._folder(sha256) / DATASET_FILE

    def keep(self, source: Path, sha256: str) -> Path:
        """Take in a file that has that SHA-256, which is not checked again.

        It must be on this file system, and nobody may write to it any more; it stays where it
        is. When this returns the file survives a power cut. One that is there is kept. Raises
        StorageFull.
        """
        folder = self._folder(sha256)
        if not folder.exists():
            with full_disk_is_said():
                self._make(source, folder)
        # Only now: a folder without write permission could not have been moved. Also for one
        # found there, because its process may have died between the two.
        folder.chmod(SEALED_FOLDER_MODE)
        sync_path(folder)
        sync_path(self._root)
        return folder / DATASET_FILE

    def remove(self, sha256: str) -> None:
        """Delete a file, at once and for good; that it is missing is no error.

        When this returns a power cut does not bring it back.
        """
        folder = self._folder(sha256)
        doomed = self._scratch / uuid.uuid4().hex
        try:
            folder.chmod(FOLDER_MODE)  # a folder without write permission cannot be moved
            folder.rename(doomed)  # atomic: there is no folder without its file
        except FileNotFoundError:
            return
        sync_path(self._root)
        shutil.rmtree(doomed, ignore_errors=True)  # what is left is swept at the next start

    def sweep(self, in_use: Collection[str]) -> list[str]:
        """Remove all files but these; the SHA-256 of each that went."""
        there = [path.name for path in self._root.iterdir() if DIGEST.fullmatch(path.name)]
        unused = sorted(sha256 for sha256 in there if sha256 not in in_use)
        for sha256 in unused:
            self.remove(sha256)
        return unused

    def _folder(self, sha256: str) -> Path:
        if not DIGEST.fullmatch(sha256):
            raise ValueError(f"not a SHA-256: {sha256!r}")
        return self._root / sha256

    def _make(self, source: Path, folder: Path) -> None:
        made = self._scratch / uuid.uuid4().hex
        made.mkdir(mode=FOLDER_MODE)
        try:
            os.link(source, made / DATASET_FILE)
            (made / DATASET_FILE).chmod(SEALED_FILE_MODE)
            sync_path(made / DATASET_FILE)
            sync_path(made)
            made.rename(folder)  # atomic: no reader sees half a dataset
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise  # not another thread that was first
        finally:
            shutil.rmtree(made, ignore_errors=True)
