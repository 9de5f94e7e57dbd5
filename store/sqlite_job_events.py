"""The events of a job in the SQLite job store, written in the transactions of their changes."""

from __future__ import annotations

import sqlite3
from collections.abc import Collection, Sequence
from dataclasses import replace

from store.job_records import EventKind, JobEventRecord, JobRecord, NewEvent
from store.sqlite_columns import json_from_column, json_to_column
from store.sqlite_events import MAX_INTEGER


def write_job_events(
    db: sqlite3.Connection, job: JobRecord, events: Sequence[NewEvent], now_ns: int
) -> JobRecord:
    """Append events to those of a job; the job with its new `last_sequence`, to be stored."""
    db.executemany(
        "INSERT INTO job_event (uid, sequence, tenant, time_ns, attempt, kind, payload)"
        " VALUES (?, ?, ?, ?, ?, ?, ?)",
        [
            (
                job.uid,
                sequence,
                job.tenant,
                now_ns if event.time_ns is None else event.time_ns,
                job.attempt,
                event.kind.value,
                json_to_column(event.payload),
            )
            for sequence, event in enumerate(events, job.last_sequence + 1)
        ],
    )
    return replace(job, last_sequence=job.last_sequence + len(events))


def list_job_events(
    db: sqlite3.Connection, uid: str, after: int, limit: int, kinds: Collection[EventKind] = ()
) -> list[JobEventRecord]:
    """The first `limit` events of these kinds above the sequence number `after`; see
    `JobStore.job_events`."""
    of_kinds = f" AND kind IN ({', '.join('?' * len(kinds))})" if kinds else ""
    rows = db.execute(
        "SELECT sequence, time_ns, attempt, kind, payload FROM job_event"
        f" WHERE uid = ? AND sequence > ?{of_kinds} ORDER BY sequence LIMIT ?",
        (uid, min(after, MAX_INTEGER), *(kind.value for kind in kinds), limit),
    )
    return [
        JobEventRecord(sequence, time_ns, attempt, EventKind(kind), json_from_column(payload))
        for sequence, time_ns, attempt, kind, payload in rows
    ]


def delete_job_events(db: sqlite3.Connection, uid: str) -> None:
    """Forget all events of a job."""
    db.execute("DELETE FROM job_event WHERE uid = ?", (uid,))
