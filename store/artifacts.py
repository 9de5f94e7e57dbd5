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
import logging
import os
import re
import shutil
import stat
import uuid
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

logger = logging.getLogger(__name__)

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
FILES = (CONFIG_FILE, WEIGHTS_FILE)
PICKLE_FILES = ("adapter_model.bin", "adapter_model.pt")
"""Weights that vLLM would unpickle if there were no safetensors (vllm/lora/lora_model.py:298)."""

MAX_CONFIG_BYTES = 64 * 1024
"""PEFT writes 1 to 2 KiB; a rank for each of 400 modules fits in 64 KiB."""
MAX_WEIGHTS_BYTES = 4 * 1024**3
"""Rank 256 on all linear modules of an 8B model, in 16 bits, is 1.3 GiB."""
COPY_CHUNK_BYTES = 1024**2
FOLDER_MODE, FILE_MODE = 0o700, 0o600
SEALED_FOLDER_MODE, SEALED_FILE_MODE = 0o555, 0o444

Stamp = tuple[int, ...]
"""Differs once a file was replaced or written to; see `_stamp`."""

_DIGEST = re.compile(r"[0-9a-f]{64}")


class SourceUnusable(ValueError):
    """The source is no adapter that can be taken in. The message says what to do."""


class ArtifactDamaged(Exception):
    """Files that were stored are gone, or hold other bytes than their digest says.

    Callers read the text, so it names no folder; the log does.
    """

    def __init__(self, path: Path, what: str) -> None:
        logger.error("adapter files %s %s", path, what)
        files = f"adapter files {path.name[:12]}"
        super().__init__(f"{files} {what}; restore them, or create the version again")


@dataclass(frozen=True, slots=True)
class Artifact:
    """An adapter's files as they are kept, for good."""

    digest: str
    """Lower-case hex SHA-256 over names, sizes and contents of the files."""
    path: Path
    """Absolute folder that holds exactly the two files, read-only."""
    size_bytes: int
    """Of the files together."""
    weights_sha256: str
    """Lower-case hex SHA-256 of `adapter_model.safetensors`, as `sha256sum` prints it."""


class SourceFiles(Protocol):
    """The files of an adapter where somebody keeps them, open for one copy."""

    def chunks(self, name: str, limit_bytes: int) -> Iterator[bytes | memoryview]:
        """The bytes of one file in order; each chunk is good until the next one is asked for.

        Raises SourceUnusable if the file is missing, cannot be read or exceeds `limit_bytes`.
        """


class Source(Protocol):
    """A place that holds an adapter; those that callers may name are in `store/sources.py`."""

    def open(self) -> AbstractContextManager[SourceFiles]:
        """Reach the place. Raises SourceUnusable."""


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
        self.weights_sha256 = _weights_sha256(files)
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
        sync_path(root.resolve())  # or a power cut takes what is synced below with the names
        for leftover in self._staging.iterdir():
            shutil.rmtree(leftover)
        self._verified: dict[str, tuple[Artifact, list[Stamp]]] = {}

    def stage(self, source: Path | Source) -> StagedArtifact:
        """Copy the two files of an adapter out of `source`; anything else there is ignored.

        A Path is one that the operator chose, or ours: it may be a link to a folder, but its
        files may not be links. Raises SourceUnusable if they are missing, too large, not
        regular files, or change while they are copied, and OSError if our own disk fails or is
        full.
        """
        with _open_folder(source) if isinstance(source, Path) else source.open() as folder:
            path = self._staging / uuid.uuid4().hex
            path.mkdir(mode=FOLDER_MODE)
            try:
                files = [
                    _copy_file(folder, CONFIG_FILE, MAX_CONFIG_BYTES, path),
                    _copy_file(folder, WEIGHTS_FILE, MAX_WEIGHTS_BYTES, path),
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
        path = self._path(digest)
        try:
            hashed = [_hash_file(path / name) for name in FILES]
        except OSError as error:
            raise ArtifactDamaged(path, f"cannot be read ({error.strerror})") from error
        files = [file for file, _ in hashed]
        if _digest(files) != digest:
            raise ArtifactDamaged(path, "were changed after they were stored")
        size_bytes = sum(file.size_bytes for file in files)
        artifact = Artifact(digest, path, size_bytes, _weights_sha256(files))
        self._verified[digest] = artifact, [stamp for _, stamp in hashed]
        return artifact

    def open_verified(self, digest: str) -> Artifact:
        """The stored artifact of that digest, to be loaded now.

        Hashed the first time in this process, and whenever a file is another one or was
        touched since; otherwise only looked at. Raises as `verify` does.
        """
        with contextlib.suppress(KeyError, OSError):
            artifact, stamps = self._verified[digest]
            if stamps == [_stamp((artifact.path / name).lstat()) for name in FILES]:
                return artifact
        return self.verify(digest)

    def remove(self, digest: str) -> None:
        """Delete a stored artifact, at once and for good; that it is missing is no error.

        When this returns a power cut does not bring it back. The caller sees to it that no
        version has the digest, no engine holds it, and no copy of it is committed meanwhile.
        Raises ValueError if `digest` is no SHA-256, and OSError if the disk fails.
        """
        path = self._path(digest)
        self._verified.pop(digest, None)
        doomed = self._staging / uuid.uuid4().hex
        try:
            path.chmod(FOLDER_MODE)  # a folder without write permission cannot be moved
            path.rename(doomed)  # atomic: no reader sees half an adapter
        except FileNotFoundError:
            return
        sync_path(self._adapters)
        shutil.rmtree(doomed, ignore_errors=True)  # what is left is swept at the next start

    def _path(self, digest: str) -> Path:
        if not _DIGEST.fullmatch(digest):
            raise ValueError(f"not a digest: {digest!r}")
        return self._adapters / digest

    def digests(self) -> list[str]:
        """Digests of all that is stored."""
        return [path.name for path in self._adapters.iterdir() if _DIGEST.fullmatch(path.name)]

    def _keep(self, staged: StagedArtifact) -> Artifact:
        path = self._path(staged.digest)
        if path.exists() or not self._move(staged.path, path):
            artifact = self.verify(staged.digest)
            shutil.rmtree(staged.path, ignore_errors=True)
        else:
            artifact = Artifact(staged.digest, path, staged.size_bytes, staged.weights_sha256)
        # Only now: a folder without write permission could not have been moved. Also for one
        # found there, because its process may have died between the two.
        path.chmod(SEALED_FOLDER_MODE)
        sync_path(path)
        sync_path(self._adapters)
        return artifact

    @staticmethod
    def _move(staged: Path, path: Path) -> bool:
        """Make the copy durable and put it in place. False: another thread was first."""
        for name in FILES:
            (staged / name).chmod(SEALED_FILE_MODE)
            sync_path(staged / name)
        sync_path(staged)
        try:
            staged.rename(path)  # atomic: no reader sees half an adapter
        except OSError as error:
            if error.errno in (errno.EEXIST, errno.ENOTEMPTY):
                return False
            raise
        return True


@dataclass(frozen=True, slots=True)
class FolderFiles:
    """The files of a folder of this machine. What is read comes from the folder that is open,
    even if its path is swapped.
    """

    descriptor: int
    path: Path
    """What the folder is called in messages."""

    def chunks(self, name: str, limit_bytes: int) -> Iterator[bytes | memoryview]:
        """See `SourceFiles.chunks`. Also refuses links, and files that change meanwhile."""
        with self._open(name, limit_bytes) as file:
            remaining = os.fstat(file.fileno()).st_size
            buffer = memoryview(bytearray(COPY_CHUNK_BYTES))
            while remaining and (size := file.readinto(buffer[:remaining])):
                remaining -= size
                yield buffer[:size]
            if remaining or file.read(1):
                raise SourceUnusable(
                    f"{self.path / name} changed while it was copied; try again when it is complete"
                )

    def _open(self, name: str, limit_bytes: int) -> FileIO:
        """The file, once it is known to be a regular one within its limit."""
        path = self.path / name
        try:
            # O_NONBLOCK, because opening a FIFO would wait for a writer.
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
            descriptor = os.open(name, flags, dir_fd=self.descriptor)
        except FileNotFoundError as error:
            raise SourceUnusable(_missing(self.descriptor, self.path, name)) from error
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise SourceUnusable(
                    f"{path} is a symbolic link; copy the file itself there (cp -L)"
                ) from error
            raise SourceUnusable(
                f"{path} cannot be opened ({error.strerror}); let the gateway read it"
            ) from error
        status = os.fstat(descriptor)
        if stat.S_ISREG(status.st_mode) and status.st_size <= limit_bytes:
            return FileIO(descriptor)
        os.close(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise SourceUnusable(f"{path} is no regular file; copy the adapter's files there")
        raise SourceUnusable(
            f"{path} has {status.st_size} bytes, the limit is {limit_bytes}; "
            "an adapter needs less: save it with PEFT's save_pretrained"
        )


@contextlib.contextmanager
def _open_folder(source: Path) -> Iterator[FolderFiles]:
    try:
        descriptor = os.open(source, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError as error:
        raise SourceUnusable(f"{source} does not exist; name the adapter's folder") from error
    except NotADirectoryError as error:
        raise SourceUnusable(f"{source} is no folder; name the folder of the adapter") from error
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise SourceUnusable(f"{source} cannot be opened ({error}); check the path") from error
    try:
        yield FolderFiles(descriptor, source)
    finally:
        os.close(descriptor)


def _copy_file(folder: SourceFiles, name: str, limit_bytes: int, into: Path) -> _File:
    digest = hashlib.sha256()
    size_bytes = 0
    with (into / name).open("xb", buffering=0) as copy:
        copied = copy.fileno()
        os.fchmod(copied, FILE_MODE)
        for chunk in folder.chunks(name, limit_bytes):
            digest.update(chunk)
            _write_all(copied, chunk)
            size_bytes += len(chunk)
    return _File(name, digest.hexdigest(), size_bytes)


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


def _write_all(descriptor: int, data: bytes | memoryview) -> None:
    """`os.write` may write less than it is given, for example on a disk that fills up."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def _hash_file(path: Path) -> tuple[_File, Stamp]:
    """A stored file, and its stamp from before it was read."""
    # None of ours is a link or a FIFO; what was put in its place must not lead or wait elsewhere.
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    with FileIO(descriptor) as file:
        status = os.fstat(descriptor)
        digest = hashlib.file_digest(file, "sha256")
    return _File(path.name, digest.hexdigest(), status.st_size), _stamp(status)


def _stamp(status: os.stat_result) -> Stamp:
    # ctime too: whoever writes to a file can set its mtime back.
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _weights_sha256(files: Sequence[_File]) -> str:
    return next(file.sha256 for file in files if file.name == WEIGHTS_FILE)


def _digest(files: Sequence[_File]) -> str:
    """Of a canonical manifest: one spelling for one content, whatever the source was called."""
    manifest = json.dumps([asdict(file) for file in files], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(manifest.encode()).hexdigest()


def sync_path(path: Path) -> None:
    """Put a file's bytes, or the names in a folder, on the disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
