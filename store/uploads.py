"""Uploads: taken in piece by piece, and resumed after a crash or a power cut.

    <root>/<folder>/<tenant>/<upload_id>/   see `store/upload_folder.py`
    <root>/<folder>/.scratch/               being made or dropped; swept at the next start

Adapters and datasets have a folder each, so one kind takes no room and no id from the other.

The root must be held by a `StateFolder`. Everything here blocks on the disk; call it in a thread.
"""

from __future__ import annotations

import contextlib
import logging
import re
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from store.artifacts import FOLDER_MODE, sync_path
from store.records import NAME
from store.upload import (
    ChecksumMismatch,
    Upload,
    UploadIncomplete,
    UploadOffsetMismatch,
    UploadTooLong,
)
from store.upload_folder import (
    DatasetPlan,
    Plan,
    StorageFull,
    UploadFolder,
    UploadPlan,
    full_disk_is_said,
)

__all__ = [
    "ADAPTER_UPLOADS",
    "DATASET_UPLOADS",
    "ChecksumMismatch",
    "DatasetPlan",
    "StorageFull",
    "Upload",
    "UploadBusy",
    "UploadIdReused",
    "UploadIncomplete",
    "UploadOffsetMismatch",
    "UploadPlan",
    "UploadStatus",
    "UploadStore",
    "UploadTooLong",
    "UploadUnknown",
]

logger = logging.getLogger(__name__)

ADAPTER_UPLOADS, DATASET_UPLOADS = "uploads", "dataset-uploads"
MAX_OPEN = 16
MAX_BYTES_TOTAL = 16 * 1024**3
"""Four of the largest adapters or datasets."""
TTL_S = 86_400.0
UPLOAD_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
"""As the contract has it; so it is one name of a path, and leads nowhere else."""

_SCRATCH = ".scratch"  # no tenant's name begins with a dot


class UploadIdReused(Exception):
    """The upload id was used with other fields before."""

    def __init__(self, upload_id: str) -> None:
        super().__init__(
            f"upload id {upload_id!r} was used with other fields before; take a new one"
        )
        self.upload_id = upload_id


class UploadBusy(Exception):
    """Another call has the upload open."""

    def __init__(self, upload_id: str) -> None:
        super().__init__(
            f"another call is writing to upload {upload_id!r}; end it, then ask QueryUpload"
        )
        self.upload_id = upload_id


class UploadUnknown(LookupError):
    """There is no upload of that id."""

    def __init__(self, upload_id: str) -> None:
        super().__init__(f"there is no upload {upload_id!r}; begin at offset 0")
        self.upload_id = upload_id


@dataclass(frozen=True, slots=True)
class UploadStatus:
    """Where an upload stands."""

    offset: int
    """Bytes that survive a power cut."""
    size_bytes: int
    complete: bool
    """Whether all bytes are there, and have the sha256 that was announced."""
    expire_time_s: float | None
    """When it is dropped if nobody goes on, in seconds since the epoch; None: complete."""


class UploadStore:
    """All uploads of one kind. Construction sweeps what expired or was never made."""

    def __init__(
        self,
        root: Path,
        *,
        folder: str = ADAPTER_UPLOADS,
        max_open: int = MAX_OPEN,
        max_bytes_total: int = MAX_BYTES_TOTAL,
        ttl_s: float = TTL_S,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`folder` is the one of the kind. `max_open` counts the incomplete ones,
        `max_bytes_total` is for all together, by the sizes that were announced. `clock` gives
        seconds since the epoch."""
        self._root = root.resolve() / folder
        self._scratch = self._root / _SCRATCH
        self._scratch.mkdir(mode=FOLDER_MODE, parents=True, exist_ok=True)
        for leftover in self._scratch.iterdir():
            shutil.rmtree(leftover)
        self._max_open = max_open
        self._max_bytes_total = max_bytes_total
        self._ttl_s = ttl_s
        self._clock = clock
        self._lock = threading.Lock()
        self._claimed: set[tuple[str, str]] = set()
        self.sweep()

    def open(self, tenant: str, plan: Plan) -> Upload:
        """Begin an upload, or go on with it.

        Raises UploadIdReused if it was begun with other fields, UploadBusy while another call
        has it open, StorageFull if there are too many, they are too large together or the disk
        is full, and ValueError if `tenant` or the upload id are no names.
        """
        folder = self._folder(tenant, plan.upload_id)
        self._claim(tenant, plan.upload_id)
        try:
            if not folder.path.exists():
                with self._lock, full_disk_is_said():
                    self._make(folder, plan)
            elif folder.plan() != plan:
                raise UploadIdReused(plan.upload_id)
            return Upload(
                folder,
                plan,
                clock=self._clock,
                discard=lambda: self._discard(folder),
                release=lambda: self._release(tenant, plan.upload_id),
            )
        except BaseException:
            self._release(tenant, plan.upload_id)
            raise

    def find(self, tenant: str, upload_id: str) -> UploadStatus:
        """Where an upload stands, also while it is written to. Raises UploadUnknown."""
        folder = self._folder(tenant, upload_id)
        try:
            plan, progress = folder.plan(), folder.progress()
        except FileNotFoundError as error:
            raise UploadUnknown(upload_id) from error
        return UploadStatus(
            offset=progress.synced_bytes,
            size_bytes=plan.size_bytes,
            complete=progress.complete,
            expire_time_s=None if progress.complete else progress.time_s + self._ttl_s,
        )

    def path(self, tenant: str, upload_id: str) -> Path:
        """Folder of a complete upload, for `ArtifactStore.stage`.

        Raises UploadUnknown or UploadIncomplete.
        """
        status = self.find(tenant, upload_id)
        if not status.complete:
            raise UploadIncomplete(upload_id, status.offset)
        return self._folder(tenant, upload_id).path

    def file(self, tenant: str, upload_id: str) -> Path:
        """Data of a complete upload, for `DatasetFiles.keep`. Raises as `path` does."""
        folder = UploadFolder(self.path(tenant, upload_id))
        try:
            return folder.data(folder.plan())
        except FileNotFoundError as error:  # dropped meanwhile
            raise UploadUnknown(upload_id) from error

    def drop(self, tenant: str, upload_id: str) -> None:
        """Delete an upload; that it is missing is no error. Raises UploadBusy."""
        folder = self._folder(tenant, upload_id)
        self._claim(tenant, upload_id)
        try:
            self._discard(folder)
        finally:
            self._release(tenant, upload_id)

    def sweep(self) -> list[tuple[str, str]]:
        """Drop incomplete uploads that nobody went on with in time; tenant and id of each.

        So is one whose own files are damaged: it could neither go on nor be told about.
        """
        dropped = []
        for tenant, upload_id in self._uploads():
            with contextlib.suppress(UploadBusy):
                self._claim(tenant, upload_id)
                try:
                    folder = self._folder(tenant, upload_id)
                    if self._is_stale(folder):
                        self._discard(folder)
                        dropped.append((tenant, upload_id))
                finally:
                    self._release(tenant, upload_id)
        return dropped

    def complete(self) -> list[tuple[str, str, bool]]:
        """Complete uploads: tenant, id, and whether the limit of age is behind them."""
        found = []
        for tenant, upload_id in self._uploads():
            with contextlib.suppress(FileNotFoundError, ValueError):  # dropped meanwhile, damaged
                progress = self._folder(tenant, upload_id).progress()
                if progress.complete:
                    is_old = progress.time_s + self._ttl_s <= self._clock()
                    found.append((tenant, upload_id, is_old))
        return found

    def _is_stale(self, folder: UploadFolder) -> bool:
        if not folder.path.exists():  # dropped since it was listed
            return False
        try:
            folder.plan()
            progress = folder.progress()
        except (FileNotFoundError, ValueError) as error:
            logger.warning("upload %s is damaged, and is dropped: %s", folder.path, error)
            return True
        return not progress.complete and progress.time_s + self._ttl_s <= self._clock()

    def _uploads(self) -> Iterator[tuple[str, str]]:
        """Tenant and id of all that are there."""
        for tenant in self._root.iterdir():
            if NAME.fullmatch(tenant.name) and tenant.is_dir():
                for upload in tenant.iterdir():
                    if UPLOAD_ID.fullmatch(upload.name) and upload.is_dir():
                        yield tenant.name, upload.name

    def _folder(self, tenant: str, upload_id: str) -> UploadFolder:
        if not (NAME.fullmatch(tenant) and UPLOAD_ID.fullmatch(upload_id)):
            raise ValueError(f"not a tenant and an upload id: {tenant!r}, {upload_id!r}")
        return UploadFolder(self._root / tenant / upload_id)

    def _make(self, folder: UploadFolder, plan: Plan) -> None:
        self._check_room(plan)
        made = UploadFolder(self._scratch / uuid.uuid4().hex)
        try:
            made.make(plan, self._clock())
            folder.path.parent.mkdir(mode=FOLDER_MODE, exist_ok=True)
            sync_path(self._root)
            made.path.rename(folder.path)  # atomic: there is no half upload to go on with
            sync_path(folder.path.parent)
        finally:
            shutil.rmtree(made.path, ignore_errors=True)

    def _check_room(self, plan: Plan) -> None:
        statuses = []
        for upload in self._uploads():
            # Dropped since it was listed, or damaged, which must not keep others out.
            with contextlib.suppress(UploadUnknown, ValueError):
                statuses.append(self.find(*upload))
        if sum(not status.complete for status in statuses) >= self._max_open:
            raise StorageFull(
                f"{self._max_open} uploads are open, and no more may be; finish one, or wait until "
                "one expires"
            )
        size_bytes = plan.size_bytes + sum(status.size_bytes for status in statuses)
        if size_bytes > self._max_bytes_total:
            raise StorageFull(
                f"all uploads together would have {size_bytes} bytes, and the limit is "
                f"{self._max_bytes_total}; finish one, or wait until one expires"
            )

    def _discard(self, folder: UploadFolder) -> None:
        doomed = self._scratch / uuid.uuid4().hex
        try:
            folder.path.rename(doomed)
        except FileNotFoundError:
            return
        sync_path(folder.path.parent)
        shutil.rmtree(doomed, ignore_errors=True)  # what is left is swept at the next start

    def _claim(self, tenant: str, upload_id: str) -> None:
        with self._lock:
            if (tenant, upload_id) in self._claimed:
                raise UploadBusy(upload_id)
            self._claimed.add((tenant, upload_id))

    def _release(self, tenant: str, upload_id: str) -> None:
        with self._lock:
            self._claimed.discard((tenant, upload_id))
