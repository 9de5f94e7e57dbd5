"""One upload while it is written to: chunks in order, synced now and then, hashed on the way.

Opened by `store/uploads.py`, which sees to it that nobody else writes. Everything here blocks on
the disk; call it in a thread.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

from store.upload_folder import Plan, Progress, StorageFull, UploadFolder, full_disk_is_said

SYNC_EVERY_BYTES = 8 * 1024**2
"""What a crash can cost, and has to be sent again."""


class UploadOffsetMismatch(Exception):
    """A chunk does not begin where the upload stands."""

    def __init__(self, upload_id: str, expected: int) -> None:
        super().__init__(f"upload {upload_id!r} stands at offset {expected}; go on from there")
        self.upload_id = upload_id
        self.expected = expected


class UploadTooLong(Exception):
    """A chunk goes on beyond the size that was announced."""

    def __init__(self, upload_id: str, size_bytes: int) -> None:
        super().__init__(
            f"upload {upload_id!r} was announced with {size_bytes} bytes, and more are sent; "
            "begin another with the right size"
        )
        self.upload_id = upload_id
        self.size_bytes = size_bytes


class UploadIncomplete(Exception):
    """Bytes are missing at the end. What came is kept."""

    def __init__(self, upload_id: str, offset: int) -> None:
        super().__init__(f"upload {upload_id!r} ends at offset {offset}; go on from there")
        self.upload_id = upload_id
        self.offset = offset


class ChecksumMismatch(Exception):
    """The bytes have another SHA-256 than was announced."""

    def __init__(self, expected: str, actual: str) -> None:
        super().__init__(
            f"the bytes have the sha256 {actual}, and {expected} was announced; compare with "
            "sha256sum, and send them again from offset 0"
        )
        self.expected = expected
        self.actual = actual


class Upload:
    """An upload that is being written to, by one thread at a time.

    A context manager: leaving it closes the upload, which can be opened again.
    """

    def __init__(
        self,
        folder: UploadFolder,
        plan: Plan,
        *,
        clock: Callable[[], float],
        discard: Callable[[], None],
        release: Callable[[], None],
    ) -> None:
        """`folder` must exist and be of nobody else until `release` is called; `discard` deletes
        it. Raises StorageFull or OSError if the disk fails, and then does not release."""
        self._folder = folder
        self._plan = plan
        self._clock = clock
        self._discard = discard
        self._release = release
        self._progress = folder.progress()
        data = folder.data(plan)
        # What is complete may be shared with `store/datasets.py`, and read-only.
        self._sealed = self._progress.complete and data.lstat().st_size == plan.size_bytes
        access = os.O_RDONLY if self._sealed else os.O_RDWR
        self._descriptor = os.open(data, access | os.O_NOFOLLOW)
        try:
            # Never more than is there, should the disk have lost what it had promised.
            size_bytes = min(self._progress.synced_bytes, os.fstat(self._descriptor).st_size)
            self._rewind(size_bytes)
            self._save(complete=self._sealed)
        except BaseException:
            os.close(self._descriptor)
            raise
        # What an earlier call wrote is hashed at the end.
        self._digest = hashlib.sha256() if size_bytes == 0 else None

    @property
    def offset(self) -> int:
        """Where the next chunk must begin; bytes of the data so far."""
        return self._offset

    def write(self, offset: int, data: bytes) -> None:
        """Append a chunk; every 8 MiB it syncs.

        Raises UploadOffsetMismatch or UploadTooLong, and then has written nothing. Raises
        StorageFull or OSError if the disk does not take it, and then stands where it was
        synced last.
        """
        if offset != self._offset:
            raise UploadOffsetMismatch(self._plan.upload_id, self._offset)
        if offset + len(data) > self._plan.size_bytes:
            raise UploadTooLong(self._plan.upload_id, self._plan.size_bytes)
        with self._rewound_on_failure():
            view = memoryview(data)
            while view:
                written = os.pwrite(self._descriptor, view, self._offset)
                view = view[written:]
                self._offset += written
        if self._digest is not None:
            self._digest.update(data)
        if self._offset - self._progress.synced_bytes >= SYNC_EVERY_BYTES:
            self.sync()

    def sync(self) -> None:
        """Put all that was written on the disk. When this returns it survives a power cut.

        Raises StorageFull or OSError, and then stands where it was synced last.
        """
        if self._offset == self._progress.synced_bytes:
            return
        with self._rewound_on_failure():
            os.fdatasync(self._descriptor)
            self._save(complete=False)

    def finish(self) -> Path:
        """Compare the bytes with what was announced, and close the upload.

        Returns its folder, from which `ArtifactStore.stage` takes an adapter. Raises
        UploadIncomplete if bytes are missing, ChecksumMismatch if they are others, and then the
        upload is dropped.
        """
        self.sync()
        if self._offset != self._plan.size_bytes:
            raise UploadIncomplete(self._plan.upload_id, self._offset)
        if not self._progress.complete:
            actual = self._sha256()
            if actual != self._plan.sha256:
                self._discard()
                self.close()
                raise ChecksumMismatch(self._plan.sha256, actual)
            self._save(complete=True)
        self.close()
        return self._folder.path

    def close(self) -> None:
        """Sync, as far as the disk lets it, and let others have the upload. Safe to call twice."""
        if self._descriptor < 0:
            return
        try:
            # What cannot be synced is sent again; it must not hide why the caller leaves.
            with contextlib.suppress(StorageFull, OSError):
                self.sync()
        finally:
            os.close(self._descriptor)
            self._descriptor = -1
            self._release()

    def _sha256(self) -> str:
        if self._digest is not None:
            return self._digest.hexdigest()
        with self._folder.data(self._plan).open("rb", buffering=0) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    @contextlib.contextmanager
    def _rewound_on_failure(self) -> Iterator[None]:
        """After a sync that failed nobody knows which bytes are on disk, and the next sync may
        succeed without them; so all of them are cut off."""
        try:
            with full_disk_is_said():
                yield
        except BaseException:
            self._digest = None
            self._rewind(self._progress.synced_bytes)
            raise

    def _rewind(self, size_bytes: int) -> None:
        self._offset = size_bytes
        if not self._sealed:
            os.ftruncate(self._descriptor, size_bytes)

    def _save(self, *, complete: bool) -> None:
        progress = Progress(self._offset, complete, self._clock())
        with full_disk_is_said():
            self._folder.save(progress)
        self._progress = progress

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
