"""A job's way through its states in the SQLite job store, by TRANSITIONS of the records."""

from __future__ import annotations

import sqlite3
from dataclasses import replace
from typing import TypeVar

from store.job_records import (
    MAX_NOTICES,
    TRANSITIONS,
    Intent,
    JobActive,
    JobChange,
    JobChanged,
    JobRecord,
    JobState,
    JobTransitionRefused,
)
from store.sqlite_job_events import delete_job_events, state_changed, write_job_events
from store.sqlite_job_rows import find_job, read_job, update_job

T = TypeVar("T")


def change_job(
    db: sqlite3.Connection, seen: JobRecord, change: JobChange, now_ns: int
) -> JobRecord:
    """See `JobStore.change_job`."""
    found = find_job(db, seen.uid)
    if found is None or found.epoch != seen.epoch:
        raise JobChanged(seen.name, seen.epoch)
    changed = _with_fields(found, change)
    events = list(change.events)
    if change.state is not None:
        changed = _moved(changed, change.state, now_ns)
        events.insert(0, state_changed(found.state, change.state, change.error))
    update_job(db, write_job_events(db, changed, events, now_ns))
    return read_job(db, found.tenant, found.name)


def intend(db: sqlite3.Connection, tenant: str, name: str, intent: Intent) -> JobRecord:
    """See `JobStore.intend`."""
    found = read_job(db, tenant, name)
    if found.state.is_final or found.intent is Intent.DISCARD:
        return found
    intended = replace(found, intent=intent)
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


def _moved(record: JobRecord, state: JobState, now_ns: int) -> JobRecord:
    if state not in TRANSITIONS[record.state]:
        raise JobTransitionRefused(record, state)
    start_time_ns = record.start_time_ns
    if state is JobState.PREPARING and start_time_ns is None:
        start_time_ns = now_ns
    return replace(
        record,
        state=state,
        epoch=record.epoch + 1,
        start_time_ns=start_time_ns,
        end_time_ns=now_ns if state.is_final else None,
    )


def _with_fields(record: JobRecord, change: JobChange) -> JobRecord:
    """The record with what the change says, but for its state."""
    ingested_bytes = record.ingested_bytes if change.attempt is None else 0
    return replace(
        record,
        effective_spec=_or(change.effective_spec, record.effective_spec),
        attempt=_or(change.attempt, record.attempt),
        device=_or(change.device, record.device),
        ingested_bytes=_or(change.ingested_bytes, ingested_bytes),
        publication=_or(change.publication, record.publication),
        progress=_or(change.progress, record.progress),
        manifest=_or(change.manifest, record.manifest),
        error=_or(change.error, record.error),
        notices=[*record.notices, *change.notices][:MAX_NOTICES],
    )


def _or(new: T | None, old: T) -> T:
    return old if new is None else new
