"""A job's way through its states in the SQLite job store."""

from __future__ import annotations

import sqlite3
from dataclasses import replace

from store.job_records import Intent, JobActive, JobChange, JobChanged, JobRecord
from store.job_transitions import changed
from store.sqlite_device_use import note_device_use
from store.sqlite_job_events import delete_job_events, write_job_events
from store.sqlite_job_rows import find_job, read_job, update_job


def change_job(
    db: sqlite3.Connection, seen: JobRecord, change: JobChange, now_ns: int
) -> JobRecord:
    """See `JobStore.change_job`."""
    found = find_job(db, seen.uid)
    if found is None or found.epoch != seen.epoch:
        raise JobChanged(seen.name, seen.epoch)
    after, events = changed(found, change, now_ns)
    update_job(db, write_job_events(db, after, events, now_ns))
    note_device_use(db, found, after, now_ns)
    return read_job(db, found.tenant, found.name)


def intend(db: sqlite3.Connection, tenant: str, name: str, intent: Intent) -> JobRecord:
    """See `JobStore.intend`."""
    found = read_job(db, tenant, name)
    if found.state.is_final:
        return found
    intended = replace(found, intent=found.intent.then(intent))
    update_job(db, intended)
    return intended


def delete_job(db: sqlite3.Connection, tenant: str, name: str) -> JobRecord:
    """See `JobStore.delete_job`."""
    found = read_job(db, tenant, name)
    if not found.state.is_final:
        raise JobActive(name, found.state)
    delete_job_events(db, found.uid)
    db.execute("DELETE FROM job WHERE uid = ?", (found.uid,))
    return found
