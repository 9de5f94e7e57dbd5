"""What the rows of a dataset are like, taken in one by one."""

from __future__ import annotations

import math
from array import array
from collections import Counter

import numpy as np
import xxhash

from trainer.report import MAX_ISSUES, LengthBucket, TokenStatistics


class RowStatistics:
    """Lengths and duplicates. Keeps 16 bytes a row."""

    def __init__(self) -> None:
        self._lengths = Counter[int]()
        self._trained = 0
        self._hashes = array("Q")
        self._lines = array("Q")

    @property
    def rows(self) -> int:
        return len(self._lines)

    def add(self, line: int, ids: bytes, length: int, trained: int) -> None:
        """Take in a row of that line; `ids` are the bytes of its token ids."""
        self._lengths[length] += 1
        self._trained += trained
        self._hashes.append(xxhash.xxh3_64_intdigest(ids))
        self._lines.append(line)

    def tokens(self) -> TokenStatistics:
        """Lengths of the rows, exact."""
        if not self.rows:
            return TokenStatistics()
        total = sum(length * rows for length, rows in self._lengths.items())
        buckets = Counter[int]()
        for length, rows in self._lengths.items():
            buckets[1 << (length - 1).bit_length()] += rows
        return TokenStatistics(
            total=total,
            trained=self._trained,
            mean=total / self.rows,
            p50=self._percentile(50),
            p95=self._percentile(95),
            max=max(self._lengths),
            histogram=tuple(LengthBucket(up_to=n, rows=buckets[n]) for n in sorted(buckets)),
        )

    def duplicates(self) -> tuple[int, tuple[int, ...]]:
        """How many rows are equal to an earlier one, and their lines, at most MAX_ISSUES."""
        hashes = np.frombuffer(self._hashes, dtype=np.uint64)
        order = np.argsort(hashes, kind="stable")  # so the first of equal rows comes first
        later = order[1:][hashes[order[1:]] == hashes[order[:-1]]]
        lines = np.sort(np.frombuffer(self._lines, dtype=np.uint64)[later])
        return len(lines), tuple(lines[:MAX_ISSUES].tolist())

    def _percentile(self, percent: int) -> int:
        """The shortest length that so many rows at least do not exceed."""
        wanted, seen = math.ceil(self.rows * percent / 100), 0
        for length in sorted(self._lengths):
            seen += self._lengths[length]
            if seen >= wanted:
                break
        return length
