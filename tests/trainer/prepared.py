"""Datasets that are written and prepared, for tests."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from store.job_records import DatasetRecord
from trainer.prepare import prepare
from trainer.prepare_plan import PreparePlan
from trainer.report import DatasetReport
from trainer.rows import REPORT_FILE, ROWS_FILE
from trainer.spec import DataSpec

GOOD = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}


def exchange(asked: str, answer: str) -> dict[str, Any]:
    """A line of a chat."""
    return {
        "messages": [
            {"role": "user", "content": asked},
            {"role": "assistant", "content": answer},
        ]
    }


def write_lines(path: Path, lines: Iterable[Any]) -> Path:
    """Write a dataset; what is bytes is a line as it is."""
    data = [one if isinstance(one, bytes) else json.dumps(one).encode() for one in lines]
    path.write_bytes(b"".join(line + b"\n" for line in data))
    return path


def record(sha256: str = "d" * 64, name: str = "letters") -> DatasetRecord:
    return DatasetRecord(
        tenant="acme", name=name, sha256=sha256, size_bytes=1, format="", create_time_ns=0
    )


async def digests() -> set[str]:
    """Of all datasets that there are: those of records."""
    return {"d" * 64, *(f"{number}" * 64 for number in range(5))}


def data_spec(**fields: Any) -> DataSpec:
    return DataSpec(**fields).resolved(max_model_len=2048)


def prepared(model: Path, path: Path, folder: Path, **fields: Any) -> DatasetReport:
    """Prepare a dataset in this process."""
    folder.mkdir()
    plan = PreparePlan(dataset=str(path), model=str(model), data=data_spec(**fields))
    report = prepare(plan, folder)
    assert DatasetReport.model_validate_json((folder / REPORT_FILE).read_bytes()) == report
    assert (folder / ROWS_FILE).exists() == report.valid
    return report


def rows_of(folder: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(folder / ROWS_FILE).to_pylist()
    return rows
