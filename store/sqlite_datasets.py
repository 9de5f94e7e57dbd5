"""Datasets in the SQLite job store: names of tenants for bytes."""

from __future__ import annotations

import sqlite3
from typing import Any

from store.job_records import DatasetExists, DatasetInUse, DatasetRecord, DatasetUnknown
from store.records import DIGEST, NAME, InvalidName

_SELECT = "SELECT tenant, name, sha256, size_bytes, format, create_time_ns FROM dataset"


def add_dataset(db: sqlite3.Connection, new: DatasetRecord) -> DatasetRecord:
    """See `JobStore.add_dataset`."""
    for kind, name in (("tenant", new.tenant), ("dataset", new.name)):
        if not NAME.fullmatch(name):
            raise InvalidName(kind, name)
    if not DIGEST.fullmatch(new.sha256):
        raise ValueError(f"not a SHA-256: {new.sha256!r}")
    found = _find(db, new.tenant, new.name)
    if found is None:
        db.execute(
            "INSERT INTO dataset (tenant, name, sha256, size_bytes, format, create_time_ns)"
            " VALUES (?, ?, ?, ?, ?, ?)",
            (new.tenant, new.name, new.sha256, new.size_bytes, new.format, new.create_time_ns),
        )
        return new
    if not found.is_what(new.sha256, new.format):
        raise DatasetExists(new.name)
    return found


def read_dataset(db: sqlite3.Connection, tenant: str, name: str) -> DatasetRecord:
    """See `JobStore.dataset`."""
    found = _find(db, tenant, name)
    if found is None:
        raise DatasetUnknown(name)
    return found


def list_datasets(
    db: sqlite3.Connection, tenant: str, after: str, limit: int
) -> list[DatasetRecord]:
    """See `JobStore.datasets`."""
    rows = db.execute(
        f"{_SELECT} WHERE tenant = ? AND name > ? ORDER BY name LIMIT ?", (tenant, after, limit)
    )
    return [_record(row) for row in rows]


def dataset_digests(db: sqlite3.Connection) -> set[str]:
    """See `JobStore.dataset_digests`."""
    return {sha256 for (sha256,) in db.execute("SELECT DISTINCT sha256 FROM dataset")}


def remove_dataset(db: sqlite3.Connection, tenant: str, name: str) -> bool:
    """See `JobStore.remove_dataset`."""
    found = read_dataset(db, tenant, name)
    job = db.execute(
        "SELECT name FROM job WHERE end_time_ns IS NULL AND tenant = ?"
        " AND ? IN (dataset, eval_dataset) ORDER BY number LIMIT 1",
        (tenant, name),
    ).fetchone()
    if job is not None:
        raise DatasetInUse(name, job[0])
    db.execute("DELETE FROM dataset WHERE tenant = ? AND name = ?", (tenant, name))
    row = db.execute("SELECT 1 FROM dataset WHERE sha256 = ? LIMIT 1", (found.sha256,))
    return row.fetchone() is None


def _find(db: sqlite3.Connection, tenant: str, name: str) -> DatasetRecord | None:
    row = db.execute(f"{_SELECT} WHERE tenant = ? AND name = ?", (tenant, name)).fetchone()
    return None if row is None else _record(row)


def _record(row: tuple[Any, ...]) -> DatasetRecord:
    return DatasetRecord(*row)
