"""What is uploaded: a file or bytes, with size and digest."""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

READ_BYTES = 1024 * 1024


@dataclass(frozen=True, slots=True)
class UploadSource:
    """Bytes on this machine that were hashed, and can be read again."""

    content: Path | bytes = field(repr=False)
    size_bytes: int
    sha256: str
    """Lower-case hex."""

    @classmethod
    def of(cls, content: Path | bytes) -> UploadSource:
        """Hash `content` piece by piece. Blocks on the disk; call it in a thread.

        Raises:
            OSError: the file cannot be read.
        """
        # `hashlib.file_digest` begins with Python 3.11; this package does with 3.10.
        digest, size_bytes = hashlib.sha256(), 0
        with _opened(content) as file:
            while data := file.read(READ_BYTES):
                digest.update(data)
                size_bytes += len(data)
        return cls(content, size_bytes, digest.hexdigest())

    @property
    def name(self) -> str:
        """For messages."""
        return str(self.content) if isinstance(self.content, Path) else "the data"

    def open(self) -> BinaryIO:
        """At its begin, unbuffered.

        Raises:
            OSError: the file cannot be read.
        """
        return _opened(self.content)


def _opened(content: Path | bytes) -> BinaryIO:
    if isinstance(content, Path):
        return content.open("rb", buffering=0)
    return io.BytesIO(content)
