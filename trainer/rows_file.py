"""Writes the file of prepared rows, a batch at a time; `trainer/rows.py` has its columns."""

from __future__ import annotations

import os
from array import array
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

BATCH_TOKENS = 1_000_000
"""That are held in memory: 8 bytes each, and as much again while they are written."""
BATCH_ROWS = 16_384

SCHEMA = pa.schema(
    {
        "line": pa.int64(),
        "input_ids": pa.list_(pa.int32()),
        "labels": pa.list_(pa.int32()),
    }
)


class RowsWriter:
    """A new file of rows. Left by an error, it is no whole file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._writer = pq.ParquetWriter(path, SCHEMA, compression="zstd")
        self._clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self._flush()
        self._writer.close()
        if kind is None:
            with self._path.open("rb") as file:
                os.fsync(file.fileno())

    def add(self, line: int, ids: array[int], labels: array[int]) -> None:
        """Add a row; both are arrays of int32 ("i")."""
        self._lines.append(line)
        self._ids.extend(ids)
        self._labels.extend(labels)
        self._ends.append(len(self._ids))
        if len(self._ids) >= BATCH_TOKENS or len(self._lines) >= BATCH_ROWS:
            self._flush()

    def _flush(self) -> None:
        if not self._lines:
            return
        ends = pa.array(np.frombuffer(self._ends, dtype=np.int32))
        columns = [
            pa.array(np.frombuffer(self._lines, dtype=np.int64)),
            *(
                pa.ListArray.from_arrays(ends, pa.array(np.frombuffer(values, dtype=np.int32)))
                for values in (self._ids, self._labels)
            ),
        ]
        self._writer.write_batch(pa.record_batch(columns, schema=SCHEMA))
        del columns, ends  # they are views of the arrays, which are replaced and not emptied
        self._clear()

    def _clear(self) -> None:
        self._lines = array("q")
        self._ids = array("i")
        self._labels = array("i")
        self._ends = array("i", [0])
