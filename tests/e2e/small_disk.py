"""A file system of its own, for tests that fill it."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

FILLER = "filler"
CHUNK_BYTES = 1024**2


class SmallDisk:
    """A tmpfs. What is written beyond its size gets ENOSPC from the kernel."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def room_bytes(self) -> int:
        """That are free."""
        found = os.statvfs(self.path)
        return found.f_bavail * found.f_frsize

    def leave(self, room_bytes: int) -> None:
        """Take all but so many bytes, or give back what was taken of them."""
        filler = self.path / FILLER
        with filler.open("ab", buffering=0) as file:
            while (excess := self.room_bytes - room_bytes) > 0:
                try:
                    file.write(bytes(min(CHUNK_BYTES, excess)))
                except OSError:  # others write meanwhile
                    return
            file.truncate(max(0, filler.stat().st_size + excess))

    def reserve(self, file: Path, size_bytes: int) -> None:
        """Room for a file that grows to that size, which nobody else gets."""
        command = ["fallocate", "--keep-size", "--length", str(size_bytes), str(file)]
        subprocess.run(command, check=True)

    def free(self) -> None:
        """Give all of it back."""
        (self.path / FILLER).unlink(missing_ok=True)


@contextlib.contextmanager
def small_disk(path: Path, size_bytes: int) -> Iterator[SmallDisk]:
    """Mounted until the end of the block. Skips where that is not allowed."""
    path.mkdir(parents=True, exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size_bytes},mode=700", "tmpfs", str(path)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    try:
        yield SmallDisk(path)
    finally:
        # Lazily: what was killed just now may still be leaving it.
        subprocess.run(["umount", "--lazy", str(path)], check=True)
