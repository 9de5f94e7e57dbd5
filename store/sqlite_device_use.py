"""What tenants had of the devices, in the SQLite job store: kept when their jobs are deleted."""

from __future__ import annotations

import sqlite3

from store.device_use import DeviceUse, use_after
from store.job_records import JobRecord

_SELECT = "SELECT tenant, priority, used_s, time_ns, grant_time_ns FROM device_use"


def device_uses(db: sqlite3.Connection) -> list[DeviceUse]:
    """See `JobStore.device_uses`."""
    return [DeviceUse(*row) for row in db.execute(f"{_SELECT} ORDER BY tenant, priority")]


def note_device_use(
    db: sqlite3.Connection, before: JobRecord, after: JobRecord, now_ns: int
) -> None:
    """Count what a change says of a device that was given or given back."""
    if before.device_time_ns == after.device_time_ns:
        return
    key = before.tenant, before.priority
    row = db.execute(f"{_SELECT} WHERE tenant = ? AND priority = ?", key).fetchone()
    use = use_after({} if row is None else {key: DeviceUse(*row)}, before, after, now_ns)
    if use is not None:
        db.execute(
            "INSERT OR REPLACE INTO device_use VALUES (?, ?, ?, ?, ?)",
            (use.tenant, use.priority, use.used_s, use.time_ns, use.grant_time_ns),
        )
