"""Folders of prepared rows: kept for the next who asks, and removed when they take too much.

<root>/prepared/<dataset's sha256>-<key>/     whole: the report is written last, then renamed
<root>/prepared/<...>.partial-<random>/       being made, or being removed
"""

from __future__ import annotations

import os
import secrets
import shutil
import time
from collections.abc import Collection
from pathlib import Path

from pydantic import ValidationError

from store.artifacts import sync_path
from store.upload_folder import full_disk_is_said
from trainer.prepare_plan import PLAN_FILE, PreparePlan
from trainer.report import DatasetReport
from trainer.rows import REPORT_FILE, ROWS_FILE
from trainer.run_folder import write_whole

MAX_FOLDERS = 64
MAX_BYTES = 32 * 1024**3
UNTOUCHED_S = 3600.0
"""So long after its last use a folder may be needed: a training process reads it while it
loads."""

_PARTIAL = ".partial-"


def dataset_of(name: str) -> str:
    """The SHA-256 of the dataset that a folder of this name was made of."""
    return name.partition("-")[0]


class PreparedFolders:
    """All prepared rows below one root. Methods block; construction does not touch the disk."""

    def __init__(self, root: Path) -> None:
        self._root = root / "prepared"

    def sweep(self) -> None:
        """Remove what was never finished. Nobody else may use the root."""
        self._root.mkdir(parents=True, exist_ok=True)
        for leftover in self._root.glob(f"*{_PARTIAL}*"):
            shutil.rmtree(leftover, ignore_errors=True)

    def path(self, name: str) -> Path:
        """The folder, whether it exists or not."""
        return self._root / name

    def find(self, name: str) -> DatasetReport | None:
        """The report of a folder, which counts as used now; None: it is not there, or damaged."""
        report_file = self.path(name) / REPORT_FILE
        try:
            report = DatasetReport.model_validate_json(report_file.read_bytes())
            if report.valid:
                os.utime(self.path(name) / ROWS_FILE)  # there, too
            os.utime(report_file)
        except (FileNotFoundError, ValidationError):
            return None
        return report

    def partial(self, name: str) -> Path:
        """Where to make a folder that gets this name: another each time, swept if left over."""
        return self._root / f"{name}{_PARTIAL}{secrets.token_hex(8)}"

    def begin(self, made: Path, plan: PreparePlan) -> None:
        """Make a folder with a plan in it. Raises StorageFull."""
        with full_disk_is_said():
            made.mkdir(parents=True)
            write_whole(made / PLAN_FILE, plan)

    def finish(self, made: Path, name: str) -> DatasetReport:
        """Give a folder that is whole its name."""
        if self.path(name).exists():  # one that was damaged
            self.remove(name)
        made.rename(self.path(name))
        sync_path(self._root)
        report = self.find(name)
        assert report is not None
        return report

    def drop(self, made: Path) -> None:
        """Remove a folder that was begun, if it is not finished."""
        shutil.rmtree(made, ignore_errors=True)

    def remove(self, name: str) -> None:
        """Remove a folder. A crash leaves it whole, or for the next sweep."""
        doomed = self.partial(name)
        try:
            self.path(name).rename(doomed)
        except FileNotFoundError:
            return
        shutil.rmtree(doomed, ignore_errors=True)

    def prune(self) -> None:
        """Remove those that were not used for longest, while they are too many or too large."""
        used = sorted(((self._used_s(name), name) for name in self._names()), reverse=True)
        size_bytes, latest_s = 0, time.time() - UNTOUCHED_S
        for count, (used_s, name) in enumerate(used, start=1):
            try:
                size_bytes += sum(file.stat().st_size for file in self.path(name).iterdir())
            except FileNotFoundError:
                continue  # another was faster
            if used_s < latest_s and (count > MAX_FOLDERS or size_bytes > MAX_BYTES):
                self.remove(name)

    def remove_dataset(self, sha256: str) -> None:
        """Remove what was made of a dataset. What is being made of it now is not: who makes it
        has to look once it is finished."""
        for name in self._names():
            if dataset_of(name) == sha256:
                self.remove(name)

    def keep_only(self, datasets: Collection[str]) -> None:
        """Remove the folders of all other datasets, by SHA-256. While none is made."""
        for name in self._names():
            if dataset_of(name) not in datasets:
                self.remove(name)

    def _names(self) -> list[str]:
        try:
            return [entry.name for entry in self._root.iterdir() if _PARTIAL not in entry.name]
        except FileNotFoundError:
            return []

    def _used_s(self, name: str) -> float:
        try:
            return (self.path(name) / REPORT_FILE).stat().st_mtime
        except FileNotFoundError:
            return 0.0
