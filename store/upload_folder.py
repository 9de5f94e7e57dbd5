"""The folder of one upload: what is announced, what has come, and how much of it is safe.

    plan.json                   what is uploaded, and what becomes of it
    adapter_config.json         of an adapter: all of it, from the begin
    progress.json               how much of the data is on disk for sure
    adapter_model.safetensors   the data; may be longer than that. Of a dataset: data.jsonl

The length of the data does not tell how much of it is on disk: after a power cut a file may
have its new length and other bytes, or none. So the length that counts is written down, by
rename, once the bytes below it are synced; what lies above is cut off before the upload goes on.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from store.artifacts import CONFIG_FILE, FILE_MODE, FOLDER_MODE, WEIGHTS_FILE, sync_path

PLAN_FILE = "plan.json"
DATASET_FILE = "data.jsonl"
PROGRESS_FILE = "progress.json"
NEW_PROGRESS_FILE = "progress.json.new"


class StorageFull(Exception):
    """The disk, or what uploads may take of it, is used up."""


class DatabaseFull(StorageFull):
    """The database has no room for a change. Nothing was changed, and it can be tried again."""


@dataclass(frozen=True, slots=True)
class UploadPlan:
    """An adapter that is uploaded, and what becomes of it. Equal headers have equal fields."""

    upload_id: str
    adapter: str
    adapter_config: bytes
    """Content of `adapter_config.json`."""
    weights_size_bytes: int
    weights_sha256: str
    """Lower-case hex."""
    labels: Mapping[str, str] = field(default_factory=dict)
    take_traffic: bool = True
    fingerprints: Mapping[str, str] = field(default_factory=dict)
    """As in `store.records.NewVersion`."""

    @property
    def size_bytes(self) -> int:
        """Of the data."""
        return self.weights_size_bytes

    @property
    def sha256(self) -> str:
        """Of the data."""
        return self.weights_sha256


@dataclass(frozen=True, slots=True)
class DatasetPlan:
    """A dataset that is uploaded. Equal headers have equal fields."""

    upload_id: str
    dataset: str
    """What it will be called."""
    size_bytes: int
    sha256: str
    """Lower-case hex."""
    format: str = ""
    """As in `store.job_records.DatasetRecord`."""


Plan = UploadPlan | DatasetPlan


@dataclass(frozen=True, slots=True)
class Progress:
    """How far an upload is."""

    synced_bytes: int
    """Of the data; these survive a power cut."""
    complete: bool
    """Whether all bytes are there, and have the SHA-256 that was announced."""
    time_s: float
    """When somebody last went on with it, in seconds since the epoch."""


@dataclass(frozen=True, slots=True)
class UploadFolder:
    """The folder, whether it exists or not. All methods raise OSError if the disk fails, and
    those that read ValueError if a file is damaged."""

    path: Path

    def data(self, plan: Plan) -> Path:
        """File that is appended to."""
        return self.path / (DATASET_FILE if isinstance(plan, DatasetPlan) else WEIGHTS_FILE)

    def make(self, plan: Plan, time_s: float) -> None:
        """Make the folder, with no data yet. When this returns its content survives a power
        cut; its name does once the folder above is synced."""
        self.path.mkdir(mode=FOLDER_MODE)
        fields = asdict(plan)
        if isinstance(plan, UploadPlan):
            _write(self.path / CONFIG_FILE, fields.pop("adapter_config"))
        _write(self.path / PLAN_FILE, json.dumps(fields).encode())
        _write(self.data(plan), b"")
        self.save(Progress(0, complete=False, time_s=time_s))

    def plan(self) -> Plan:
        """What was announced. Raises FileNotFoundError if there is no such upload."""
        fields = _read(self.path / PLAN_FILE)
        try:
            if "dataset" in fields:
                return DatasetPlan(**fields)
            return UploadPlan(adapter_config=(self.path / CONFIG_FILE).read_bytes(), **fields)
        except TypeError as error:
            raise ValueError(f"{self.path / PLAN_FILE} has other fields: {error}") from error

    def progress(self) -> Progress:
        """How far it is. Raises FileNotFoundError if there is no such upload."""
        fields = _read(self.path / PROGRESS_FILE)
        try:
            return Progress(**fields)
        except TypeError as error:
            raise ValueError(f"{self.path / PROGRESS_FILE} has other fields: {error}") from error

    def save(self, progress: Progress) -> None:
        """Replace the progress in one step. When this returns it survives a power cut."""
        _write(self.path / NEW_PROGRESS_FILE, json.dumps(asdict(progress)).encode())
        (self.path / NEW_PROGRESS_FILE).rename(self.path / PROGRESS_FILE)
        sync_path(self.path)


@contextlib.contextmanager
def full_disk_is_said() -> Iterator[None]:
    """Turn what the system says of a full disk or quota into StorageFull."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StorageFull(
                "the gateway's disk is full; go on later, or have its operator free space"
            ) from error
        raise


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        os.fchmod(file.fileno(), FILE_MODE)
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _read(path: Path) -> dict[str, Any]:
    fields = json.loads(path.read_bytes())
    if not isinstance(fields, dict):
        raise ValueError(f"{path} holds no JSON object")
    return fields
