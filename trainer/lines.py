"""The lines of a dataset's file, one after another, however long they are."""

from __future__ import annotations

from codecs import BOM_UTF8
from collections.abc import Iterator
from pathlib import Path

MAX_LINE_BYTES = 16 * 1024**2
"""Of a line without its end. No line of so many bytes is a row, and none is held in memory."""

_BUFFER_BYTES = 1024**2


def read_lines(path: Path, offset: int = 0) -> Iterator[bytes | None]:
    """Each line as it is, without its end; None for one of more than MAX_LINE_BYTES.

    A last line without text is none, and neither is the mark that some editors write at a file's
    begin. `offset` is where a line begins. Raises OSError.
    """
    with path.open("rb", buffering=_BUFFER_BYTES) as file:
        if not offset and file.read(len(BOM_UTF8)) == BOM_UTF8:
            offset = len(BOM_UTF8)
        file.seek(offset)
        while line := file.readline(MAX_LINE_BYTES + 2):
            if line.endswith(b"\n"):
                text = line[:-2] if line.endswith(b"\r\n") else line[:-1]
                yield text if len(text) <= MAX_LINE_BYTES else None
            elif len(line) > MAX_LINE_BYTES:
                while (rest := file.readline(_BUFFER_BYTES)) and not rest.endswith(b"\n"):
                    pass
                yield None
            elif line.strip():
                yield line


def line_at(path: Path, number: int) -> bytes | None:
    """One line, from 1, as `read_lines` has it.

    Gets there without a Python object for each line before it. Raises LookupError if the file
    does not have so many, and OSError.
    """
    before, offset = number - 1, 0
    with path.open("rb", buffering=0) as file:
        while before and (block := file.read(_BUFFER_BYTES)):
            ends = block.count(b"\n")
            if ends < before:
                before -= ends
                offset += len(block)
                continue
            at = 0
            for _ in range(before):
                at = block.index(b"\n", at) + 1
            before = 0
            offset += at
    lines = iter(()) if before else read_lines(path, offset)
    for line in lines:
        return line
    raise LookupError(f"the file has no line {number}")
