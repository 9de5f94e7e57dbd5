"""What a core computes at this moment, in a file that outlives it.

The core writes down each step before it is computed and crosses it out after. When the core has
died, what is not crossed out was being computed. The file is mapped into memory: a step costs no
system call, and what was written is there however the process ended.

    file: magic, slots, bytes of a slot, exit codes of executor processes | slot | slot ...
    slot: sequence, length, whether it is open, checksum | text

A step has a slot of its own, because several may be on their way (vLLM schedules the next one
while a GPU computes). Its sequence is odd while it is written, and its text has a checksum, so
that a reader sees what is torn. Nothing was computed of a step whose record is torn.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import xxhash

from engine.fingerprint import Tagged, untag

MAGIC = 0x5253474C
MAX_EXITS = 64
"""Executor processes of one core: its devices."""
ID_BYTES = 128
NAME_BYTES = 256
"""Most that a request's id and a version's name take."""
_FILE = struct.Struct(f"<III{MAX_EXITS}i")
_SLOT = struct.Struct("<QIIQ")
_SEQUENCE = struct.Struct("<Q")
_OPEN = struct.Struct("<I")
_OPEN_AT = 12
NO_EXIT = -(2**31)


@dataclass(frozen=True, slots=True)
class Steps:
    """The steps that were begun and not finished."""

    fresh: frozenset[Tagged] = frozenset()
    """Requests in the first step of theirs."""
    older: frozenset[Tagged] = frozenset()
    """Requests that had been through a step before."""
    versions: frozenset[str] = frozenset()
    """Names of the adapter versions; empty is the base model."""
    executor_exits: tuple[int, ...] = ()
    """Exit codes of processes that computed for the core and had ended before it did."""

    @property
    def requests(self) -> frozenset[Tagged]:
        """All that were in them."""
        return self.fresh | self.older

    def is_alone(self, fingerprint: int) -> bool:
        """Whether nothing but this was being computed, or nothing else for the first time: what
        crashes an engine mostly does so at once."""
        return {request.fingerprint for request in self.fresh or self.older} == {fingerprint}


class StepRecord:
    """The core's side: writes."""

    def __init__(self, path: Path, slots: int, max_requests: int, max_versions: int) -> None:
        """Makes the file, for this user alone. Raises OSError."""
        self._room = max_requests * ID_BYTES + max_versions * NAME_BYTES + 64
        self._slot_bytes = _SLOT.size + self._room
        self._slots = slots
        self._sequence = 0
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            os.ftruncate(descriptor, _FILE.size + slots * self._slot_bytes)
            self._map = mmap.mmap(descriptor, 0)
        finally:
            os.close(descriptor)
        _FILE.pack_into(self._map, 0, MAGIC, slots, self._slot_bytes, *[NO_EXIT] * MAX_EXITS)

    def begin(self, fresh: Sequence[str], older: Sequence[str], versions: Iterable[str]) -> int:
        """Write down a step, with the engine's ids of its requests; returns its slot.

        What has no room is left out.
        """
        text = "\n".join(("\t".join(versions), str(len(fresh)), *fresh, *older)).encode()
        text = text[: self._room]  # what is left of the last id is none
        slot = self._sequence % self._slots
        at = _FILE.size + slot * self._slot_bytes
        self._sequence += 1
        _SEQUENCE.pack_into(self._map, at, 2 * self._sequence - 1)
        start = at + _SLOT.size
        self._map[start : start + len(text)] = text
        done = 2 * self._sequence
        checksum = xxhash.xxh3_64_intdigest(text)
        _SLOT.pack_into(self._map, at, 2 * self._sequence - 1, len(text), 1, checksum)
        _SEQUENCE.pack_into(self._map, at, done)
        return slot

    def end(self, slot: int) -> None:
        """Cross out a step: it was computed."""
        _OPEN.pack_into(self._map, _FILE.size + slot * self._slot_bytes + _OPEN_AT, 0)

    def note_exits(self, codes: Sequence[int]) -> None:
        """Write down how processes ended that computed for the core."""
        known = [*codes[:MAX_EXITS], *[NO_EXIT] * (MAX_EXITS - len(codes))]
        _FILE.pack_into(self._map, 0, MAGIC, self._slots, self._slot_bytes, *known)

    def close(self) -> None:
        """Unmap the file, which stays."""
        self._map.close()


def read_steps(path: Path) -> Steps:
    """The steps that are not crossed out. None of them if there is no such file, or it is no
    record."""
    try:
        content = path.read_bytes()
    except OSError:
        return Steps()
    if len(content) < _FILE.size:
        return Steps()
    magic, slots, slot_bytes, *exits = _FILE.unpack_from(content)
    if magic != MAGIC or slot_bytes < _SLOT.size:
        return Steps()
    fresh: set[Tagged] = set()
    older: set[Tagged] = set()
    versions: set[str] = set()
    for number in range(slots):
        lines = _open_step(content, _FILE.size + number * slot_bytes, slot_bytes)
        if lines is None:
            continue
        names, count, *ids = lines
        versions.update(names.split("\t"))
        for place, engine_id in enumerate(ids):
            if (tagged := untag(engine_id)) is not None:
                (fresh if place < int(count) else older).add(tagged)
    return Steps(
        frozenset(fresh),
        frozenset(older - fresh),
        frozenset(versions),
        tuple(code for code in exits if code != NO_EXIT),
    )


def _open_step(content: bytes, at: int, slot_bytes: int) -> list[str] | None:
    """The lines of a step; None if it is crossed out, torn or was never there."""
    if len(content) < at + slot_bytes:
        return None
    sequence, length, is_open, checksum = _SLOT.unpack_from(content, at)
    if not is_open or sequence % 2 or length > slot_bytes - _SLOT.size:
        return None
    text = content[at + _SLOT.size : at + _SLOT.size + length]
    return text.decode().split("\n") if xxhash.xxh3_64_intdigest(text) == checksum else None
