"""The state folder: one process at a time owns everything that lasts.

The lock is the kernel's (`flock`), so it ends with the process that holds it, whatever way
that process dies; a lock file that is merely there means nothing. Processes are spawned, never
forked, here: a forked child would share the lock and keep it alive.
"""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path
from types import TracebackType
from typing import Self

LOCK_FILE = "lock"
FOLDER_MODE = 0o700
"""The database and the adapters of all tenants are for the owner alone."""
LOCK_MODE = 0o600
MAX_PID_BYTES = 20
"""Bytes of the lock file that are read as the holder's pid; 2**64 has 20 digits."""


class StateFolderUnusable(Exception):
    """The folder cannot hold state. The message is one line: what is wrong, what to do."""


class StateFolderLocked(StateFolderUnusable):
    """Another process holds the folder."""

    def __init__(self, path: Path, holder_pid: int | None) -> None:
        holder = f"process {holder_pid}" if holder_pid else "another process"
        super().__init__(
            f"state folder {path} is in use by {holder}; stop it, or choose another --state-dir"
        )
        self.path = path
        self.holder_pid = holder_pid
        """None when the holder has not written it yet. Of its own pid namespace."""


class StateFolder:
    """The folder of everything that lasts, locked from construction until `close`.

    Makes the folder (and its parents) when missing, for its owner alone. Raises
    StateFolderLocked when another process holds it, StateFolderUnusable when it cannot be
    made, written or locked.
    """

    def __init__(self, path: Path) -> None:
        try:
            _make(path)
            # Absolute, because vLLM takes a relative adapter path that does not exist for a
            # hub id and downloads it (vllm/lora/utils.py:329).
            self.path = path.resolve(strict=True)
            self._lock = os.open(
                self.path / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, LOCK_MODE
            )
        except (FileExistsError, NotADirectoryError) as error:
            raise StateFolderUnusable(
                f"state folder {path} is a file, or lies under one; name a folder with --state-dir"
            ) from error
        except OSError as error:
            raise StateFolderUnusable(
                f"state folder {path} cannot be written ({_reason(error)}); "
                "correct its owner and mode, or choose another --state-dir"
            ) from error
        try:
            self._acquire()
        except BaseException:
            os.close(self._lock)
            raise
        self._open = True

    def _acquire(self) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StateFolderLocked(self.path, self._read_pid()) from error
        except OSError as error:
            raise StateFolderUnusable(
                f"state folder {self.path} cannot be locked ({_reason(error)}); "
                "choose a local disk with --state-dir"
            ) from error
        self._write_pid(f"{os.getpid()}\n")

    def _read_pid(self) -> int | None:
        text = os.pread(self._lock, MAX_PID_BYTES, 0).strip()
        return int(text) if text.isdigit() else None

    def _write_pid(self, text: str) -> None:
        try:
            os.ftruncate(self._lock, 0)
            os.pwrite(self._lock, text.encode(), 0)
        except OSError as error:
            raise StateFolderUnusable(
                f"state folder {self.path} cannot be written ({_reason(error)}); "
                "free space, or choose another --state-dir"
            ) from error

    def close(self) -> None:
        """Let another process have the folder. Safe to call twice.

        The lock file stays: removing it would let two processes lock two files of that name.
        """
        if self._open:
            self._open = False
            os.close(self._lock)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _make(path: Path) -> None:
    """Make the folder and its parents, so that a power cut does not take their names again."""
    if not path.is_dir():
        _make(path.parent)
        path.mkdir(mode=FOLDER_MODE, exist_ok=True)
        parent = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(parent)
        finally:
            os.close(parent)


def _reason(error: OSError) -> str:
    return os.strerror(error.errno if error.errno is not None else errno.EIO)
