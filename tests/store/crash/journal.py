"""The journal of the crash layer: the calls that changed files, and notes between them."""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass
from pathlib import Path

_HEADER = struct.Struct("=QqIIB")


class Op(enum.IntEnum):
    """What a call did. As in `layer.cpp`."""

    NOTE = 0
    CREATE = 1
    WRITE = 2
    TRUNCATE = 3
    SYNC = 4
    RENAME = 5
    UNLINK = 6
    MKDIR = 7
    RMDIR = 8


@dataclass(frozen=True, slots=True)
class Entry:
    """One call that succeeded, or a note."""

    call: int
    """Counts the calls from 1 up; of a note: the call before it."""
    op: Op
    path: str
    """Relative to the watched folder; empty: the folder itself."""
    offset: int
    """In bytes, of a WRITE; the new size of a TRUNCATE."""
    data: bytes
    """What was written; the new path of a RENAME; the text of a NOTE."""


def read_journal(path: Path) -> list[Entry]:
    """All entries, in the order in which they happened."""
    journal = path.read_bytes()
    entries = []
    position = 0
    while position < len(journal):
        call, offset, path_bytes, data_bytes, op = _HEADER.unpack_from(journal, position)
        middle = position + _HEADER.size + path_bytes
        name = journal[position + _HEADER.size : middle].decode()
        entries.append(Entry(call, Op(op), name, offset, journal[middle : middle + data_bytes]))
        position = middle + data_bytes
    return entries
