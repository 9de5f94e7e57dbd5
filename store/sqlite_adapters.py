"""Adapters in the SQLite registry: names, each with the split that stands."""

from __future__ import annotations

import sqlite3
from collections import defaultdict

from store.records import AdapterRecord, AdapterUnknown, VersionState
from store.sqlite_columns import arms_from_column, guard_from_column

_SELECT = """
SELECT a.tenant, a.adapter, coalesce(t.arms, '[]'), t.guard, a.traffic_revision,
       a.last_version, a.create_time_ns, coalesce(t.time_ns, a.create_time_ns)
FROM adapter AS a
LEFT JOIN traffic AS t
    ON t.tenant = a.tenant AND t.adapter = a.adapter AND t.revision = a.traffic_revision
"""

_Row = tuple[str, str, str, str | None, int, int, int, int]


def adapter_exists(db: sqlite3.Connection, tenant: str, adapter: str) -> bool:
    """Whether there is an adapter of that name."""
    row = db.execute("SELECT 1 FROM adapter WHERE tenant = ? AND adapter = ?", (tenant, adapter))
    return row.fetchone() is not None


def read_adapter(db: sqlite3.Connection, tenant: str, adapter: str) -> AdapterRecord:
    """See `Registry.adapter`."""
    row = db.execute(f"{_SELECT} WHERE a.tenant = ? AND a.adapter = ?", (tenant, adapter))
    found = row.fetchone()
    if found is None:
        raise AdapterUnknown(adapter)
    return _record(found)


def list_adapters(
    db: sqlite3.Connection, tenant: str, after: str, prefix: str, limit: int
) -> list[AdapterRecord]:
    """See `Registry.adapters`."""
    # One bound on each side, so that the index is entered where the page begins. "\0" makes
    # the next text in order, and no name has a character above "\x7e".
    low = max(f"{after}\0", prefix) if after else prefix
    high = f"{prefix}\x7f"
    rows = db.execute(
        f"{_SELECT} WHERE a.tenant = ? AND a.adapter >= ? AND a.adapter < ?"
        " ORDER BY a.adapter LIMIT ?",
        (tenant, low, high, limit),
    )
    return [_record(row) for row in rows]


def read_snapshot(db: sqlite3.Connection) -> list[tuple[AdapterRecord, tuple[int, ...]]]:
    """See `Registry.snapshot`."""
    ready: defaultdict[tuple[str, str], list[int]] = defaultdict(list)
    for tenant, adapter, version in db.execute(
        "SELECT tenant, adapter, version FROM adapter_version WHERE state = ?"
        " ORDER BY tenant, adapter, version",
        (VersionState.READY.value,),
    ):
        ready[tenant, adapter].append(version)
    records = [_record(row) for row in db.execute(f"{_SELECT} ORDER BY a.tenant, a.adapter")]
    return [(record, tuple(ready[record.tenant, record.adapter])) for record in records]


def _record(row: _Row) -> AdapterRecord:
    tenant, adapter, arms, guard, *rest = row
    return AdapterRecord(tenant, adapter, arms_from_column(arms), guard_from_column(guard), *rest)
