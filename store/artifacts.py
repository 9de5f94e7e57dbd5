"""Adapter files, immutable and addressed by their content.

    <root>/staging/<uuid>/      a copy being made and validated; swept at the next start
    <root>/adapters/<digest>/   adapter_config.json, adapter_model.safetensors; never written again

vLLM reads an adapter's files again whenever its cache evicted it, in the middle of a step, and
a file that is missing or has changed by then ends the engine (vllm/lora/worker_manager.py:286).
So it is only ever given a path in here. What is copied is what is hashed and, later, what is
validated: nothing can change in between.

The root must be held by a `StateFolder`: construction sweeps what an earlier process left.
Everything here blocks on the disk; call it in a thread.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import stat
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PICKLE_FILES = ("adapter_model.bin", "adapter_model.pt")
"""Weights that vLLM would unpickle if there were no safetensors (vllm/lora/lora_model.py:298)."""

MAX_CONFIG_BYTES = 64 * 1024
"""PEFT writes 1 to 2 KiB; a rank for each of 400 modules fits in 64 KiB."""
MAX_WEIGHTS_BYTES = 4 * 1024**3
"""Rank 256 on all linear modules of an 8B model, in 16 bits, is 1.3 GiB."""
COPY_CHUNK_BYTES = 1024**2
FOLDER_MODE, FILE_MODE = 0o700, 0o600
SEALED_FOLDER_MODE, SEALED_FILE_MODE = 0o555, 0o444

_DIGEST = re.compile(r"[0-9a-f]{64}")


class SourceUnusable(ValueError):
    """The folder is no adapter that can be taken in. The message says what to do."""


class ArtifactDamaged(Exception):
    """Files that were stored are gone, or hold other bytes than their digest says."""


@dataclass(frozen=True, slots=True)
class Artifact:
    """An adapter's files as they are kept, for good."""

    digest: str
    """Lower-case hex SHA-256 over names, sizes and contents of the files."""
    path: Path
    """Absolute folder that holds exactly the two files, read-only."""
    size_bytes: int
    """Of the files together."""


@dataclass(frozen=True, slots=True)
class _File:
    name: str
    sha256: str
    size_bytes: int


class StagedArtifact:
    """A private copy of an adapter, to be validated and then kept by `commit`.

    A context manager: leaving it without `commit` drops the copy.
    """

    def __init__(self, store: ArtifactStore, path: Path, files: Sequence[_File]) -> None:
        self.path = path
        """Folder of the copy; gone after `commit`."""
        self.digest = _digest(files)
        self.size_bytes = sum(file.size_bytes for file in files)
        self._store = store

    def commit(self) -> Artifact:
        """Keep the copy. When this returns it survives a power cut.

        Is the digest stored already, that artifact is hashed again and returned, and the copy
        is dropped. Raises ArtifactDamaged if the stored one does not hold what it should, and
        OSError if the disk fails.
        """
        return self._store._keep(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # What cannot be removed now is swept at the next start; it must not hide `error`.
        shutil.rmtree(self.path, ignore_errors=True)


class ArtifactStore:
    """All adapter files below one root. Construction sweeps leftover staging folders."""

    def __init__(self, root: Path) -> None:
        self._staging = root.resolve() / "staging"
        self._adapters = root.resolve() / "adapters"
        for folder in (self._staging, self._adapters):
            folder.mkdir(mode=FOLDER_MODE, parents=True, exist_ok=True)
        for leftover in self._staging.iterdir():
            shutil.rmtree(leftover)

    def stage(self, source: Path) -> StagedArtifact:
        """Copy the two files of an adapter out of `source`; anything else there is ignored.

        `source` may be a link to a folder, but its files may not be links. Raises
        SourceUnusable if they are missing, too large, not regular files, or change while they
        are copied, and OSError if our own disk fails or is full.
        """
        with _open_folder(source) as folder:
            path = self._staging / uuid.uuid4().hex
            path.mkdir(mode=FOLDER_MODE)
            try:
                files = [
                    _copy_file(folder, source, CONFIG_FILE, MAX_CONFIG_BYTES, path),
                    _copy_file(folder, source, WEIGHTS_FILE, MAX_WEIGHTS_BYTES, path),
                ]
            except BaseException:
                shutil.rmtree(path, ignore_errors=True)
                raise
        return StagedArtifact(self, path, files)

    def verify(self, digest: str) -> Artifact:
        """The stored artifact of that digest, after hashing it again.

        Raises ArtifactDamaged if it is missing or holds other bytes, ValueError if `digest`
        is no SHA-256.
        """
        if not _DIGEST.fullmatch(digest):
            raise ValueError(f"not a digest: {digest!r}")
        path = self._adapters / digest
        try:
            files = [_hash_file(path / name) for name in (CONFIG_FILE, WEIGHTS_FILE)]
        except OSError as error:
            raise ArtifactDamaged(
                f"adapter files {path} cannot be read ({error.strerror}); restore the folder, "
                "or remove it and create the version again"
            ) from error
        if _digest(files) != digest:
            raise ArtifactDamaged(
                f"adapter files {path} were changed after they were stored; restore the folder, "
                "or remove it and create the version again"
            )
        return Artifact(digest, path, sum(file.size_bytes for file in files))

    def _keep(self, staged: StagedArtifact) -> Artifact:
        path = self._adapters / staged.digest
        if path.exists() or not self._move(staged.path, path):
            artifact = self.verify(staged.digest)
            shutil.rmtree(staged.path, ignore_errors=True)
        else:
            artifact = Artifact(staged.digest, path, staged.size_bytes)
        # Only now: a folder without write permission could not have been moved. Also for one
        # found there, because its process may have died between the two.
        path.chmod(SEALED_FOLDER_MODE)
        _fsync(path)
        _fsync(self._adapters)
        return artifact

    @staticmethod
    def _move(staged: Path, path: Path) -> bool:
        """Make the copy durable and put it in place. False: another thread was first."""
        for name in (CONFIG_FILE, WEIGHTS_FILE):
            (staged / name).chmod(SEALED_FILE_MODE)
            _fsync(staged / name)
        _fsync(staged)
        try:
            staged.rename(path)  # atomic: no reader sees half an adapter
        except OSError as error:
            if error.errno in (errno.EEXIST, errno.ENOTEMPTY):
                return False
            raise
        return True


@contextlib.contextmanager
def _open_folder(source: Path) -> Iterator[int]:
    """A descriptor of the folder: the files come from it even if the path is swapped."""
    try:
        descriptor = os.open(source, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError as error:
        raise SourceUnusable(f"{source} does not exist; name the adapter's folder") from error
    except NotADirectoryError as error:
        raise SourceUnusable(f"{source} is no folder; name the folder of the adapter") from error
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise SourceUnusable(f"{source} cannot be opened ({error}); check the path") from error
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _copy_file(folder: int, source: Path, name: str, limit_bytes: int, into: Path) -> _File:
    with _open_source(folder, source, name, limit_bytes) as file:
        size_bytes = os.fstat(file.fileno()).st_size
        digest = hashlib.sha256()
        remaining = size_bytes
        with (into / name).open("xb", buffering=0) as copy:
            copied = copy.fileno()
            os.fchmod(copied, FILE_MODE)
            while chunk := file.read(min(COPY_CHUNK_BYTES, remaining)):
                digest.update(chunk)
                _write_all(copied, chunk)
                remaining -= len(chunk)
        if remaining or file.read(1):
            raise SourceUnusable(
                f"{source / name} changed while it was copied; try again when it is complete"
            )
    return _File(name, digest.hexdigest(), size_bytes)


def _open_source(folder: int, source: Path, name: str, limit_bytes: int) -> BinaryIO:
    """The file, once it is known to be a regular one within its limit."""
    try:
        # O_NONBLOCK, because opening a FIFO would wait for a writer.
        descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
    except FileNotFoundError as error:
        raise SourceUnusable(_missing(folder, source, name)) from error
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise SourceUnusable(
                f"{source / name} is a symbolic link; copy the file itself there (cp -L)"
            ) from error
        raise SourceUnusable(
            f"{source / name} cannot be opened ({error.strerror}); let the gateway read it"
        ) from error
    status = os.fstat(descriptor)
    if stat.S_ISREG(status.st_mode) and status.st_size <= limit_bytes:
        return os.fdopen(descriptor, "rb", buffering=0)
    os.close(descriptor)
    if not stat.S_ISREG(status.st_mode):
        raise SourceUnusable(f"{source / name} is no regular file; copy the adapter's files there")
    raise SourceUnusable(
        f"{source / name} has {status.st_size} bytes, the limit is {limit_bytes}; "
        "an adapter needs less: save it with PEFT's save_pretrained"
    )


def _missing(folder: int, source: Path, name: str) -> str:
    if name == WEIGHTS_FILE:
        for pickled in PICKLE_FILES:
            with contextlib.suppress(OSError):
                os.stat(pickled, dir_fd=folder, follow_symlinks=False)
                return (
                    f"{source} holds {pickled}, which is a pickle and can run code; only "
                    "safetensors is taken: save with save_pretrained(safe_serialization=True)"
                )
    return f"{source} holds no {name}; name a folder that PEFT's save_pretrained wrote"


def _write_all(descriptor: int, data: bytes) -> None:
    """`os.write` may write less than it is given, for example on a disk that fills up."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def _hash_file(path: Path) -> _File:
    with path.open("rb", buffering=0) as file:
        digest = hashlib.file_digest(file, "sha256")
        return _File(path.name, digest.hexdigest(), os.fstat(file.fileno()).st_size)


def _digest(files: Sequence[_File]) -> str:
    """Of a canonical manifest: one spelling for one content, whatever the source was called."""
    manifest = json.dumps([asdict(file) for file in files], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(manifest.encode()).hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
