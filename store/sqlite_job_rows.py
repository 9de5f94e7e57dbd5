"""Rows of the table of jobs: read, listed, and written back as a whole."""

from __future__ import annotations

import sqlite3
from collections.abc import Collection
from typing import Any

from store.job_records import Intent, JobKey, JobRecord, JobState, JobTally, JobUnknown
from store.sqlite_columns import json_from_column, json_to_column, mapping_from_column
from store.sqlite_events import MAX_INTEGER

_SELECT = """
SELECT tenant, name, uid, number, adapter, dataset, eval_dataset, spec, effective_spec,
       fingerprints, labels, state, intent, epoch, attempt, device, ingested_bytes, last_sequence,
       publication, progress, manifest, error, notices, create_time_ns, start_time_ns, end_time_ns,
       recovery, priority, queue_time_ns, device_time_ns
FROM job
"""


def read_job(db: sqlite3.Connection, tenant: str, name: str) -> JobRecord:
    """See `JobStore.job`."""
    row = db.execute(f"{_SELECT} WHERE tenant = ? AND name = ?", (tenant, name)).fetchone()
    if row is None:
        raise JobUnknown(name)
    return _record(row)


def find_job(db: sqlite3.Connection, uid: str) -> JobRecord | None:
    """The job of that uid, unless it was deleted."""
    row = db.execute(f"{_SELECT} WHERE uid = ?", (uid,)).fetchone()
    return None if row is None else _record(row)


def list_jobs(
    db: sqlite3.Connection,
    tenant: str,
    before: int | None,
    limit: int,
    states: Collection[JobState],
    adapter: str,
) -> list[JobRecord]:
    """See `JobStore.jobs`."""
    conditions = ["tenant = ?", "number < ?"]
    values: list[str | int] = [tenant, MAX_INTEGER if before is None else before]
    if adapter:
        conditions.append("adapter = ?")
        values.append(adapter)
    if states:
        conditions.append(f"state IN ({', '.join('?' * len(states))})")
        values += [state.value for state in states]
    rows = db.execute(
        f"{_SELECT} WHERE {' AND '.join(conditions)} ORDER BY number DESC LIMIT ?",
        (*values, limit),
    )
    return [_record(row) for row in rows]


def active_jobs(db: sqlite3.Connection) -> list[JobKey]:
    """See `JobStore.active_jobs`."""
    rows = db.execute("SELECT tenant, name FROM job WHERE end_time_ns IS NULL ORDER BY number")
    return [JobKey(*row) for row in rows]


def tally(db: sqlite3.Connection) -> JobTally:
    """See `JobStore.tally`."""
    counts = dict.fromkeys(JobState, 0)
    for state, count in db.execute("SELECT state, count(*) FROM job GROUP BY state"):
        counts[JobState(state)] = count
    rows = db.execute(
        "SELECT uid, state, attempt FROM job WHERE end_time_ns IS NULL ORDER BY number"
    )
    return JobTally(counts, [(uid, JobState(state), attempt) for uid, state, attempt in rows])


def count_active_jobs(db: sqlite3.Connection) -> int:
    """How many jobs of all tenants have not ended."""
    (count,) = db.execute("SELECT count(*) FROM job WHERE end_time_ns IS NULL").fetchone()
    return int(count)


def update_job(db: sqlite3.Connection, record: JobRecord) -> None:
    """Store all that may change of a job."""
    db.execute(
        "UPDATE job SET effective_spec = ?, state = ?, intent = ?, epoch = ?, attempt = ?,"
        " device = ?, ingested_bytes = ?, last_sequence = ?, publication = ?, progress = ?,"
        " manifest = ?, error = ?, notices = ?, start_time_ns = ?, end_time_ns = ?, recovery = ?,"
        " queue_time_ns = ?, device_time_ns = ?"
        " WHERE uid = ?",
        (
            json_to_column(record.effective_spec),
            record.state.value,
            record.intent.value,
            record.epoch,
            record.attempt,
            record.device,
            record.ingested_bytes,
            record.last_sequence,
            json_to_column(record.publication),
            _optional(record.progress),
            _optional(record.manifest),
            _optional(record.error),
            json_to_column(record.notices),
            record.start_time_ns,
            record.end_time_ns,
            json_to_column(record.recovery),
            record.queue_time_ns,
            record.device_time_ns,
            record.uid,
        ),
    )


def _optional(value: object) -> str | None:
    return None if value is None else json_to_column(value)


def _record(row: tuple[Any, ...]) -> JobRecord:
    (
        tenant,
        name,
        uid,
        number,
        adapter,
        dataset,
        eval_dataset,
        spec,
        effective_spec,
        fingerprints,
        labels,
        state,
        intent,
        epoch,
        attempt,
        device,
        ingested_bytes,
        last_sequence,
        publication,
        progress,
        manifest,
        error,
        notices,
        create_time_ns,
        start_time_ns,
        end_time_ns,
        recovery,
        priority,
        queue_time_ns,
        device_time_ns,
    ) = row
    return JobRecord(
        tenant=tenant,
        name=name,
        uid=uid,
        number=number,
        adapter=adapter,
        dataset=dataset,
        eval_dataset=eval_dataset,
        spec=json_from_column(spec),
        effective_spec=json_from_column(effective_spec),
        fingerprints=mapping_from_column(fingerprints),
        labels=mapping_from_column(labels),
        priority=priority,
        state=JobState(state),
        intent=Intent(intent),
        epoch=epoch,
        attempt=attempt,
        device=device,
        ingested_bytes=ingested_bytes,
        last_sequence=last_sequence,
        publication=json_from_column(publication),
        progress=None if progress is None else json_from_column(progress),
        manifest=None if manifest is None else json_from_column(manifest),
        error=None if error is None else json_from_column(error),
        notices=json_from_column(notices),
        create_time_ns=create_time_ns,
        queue_time_ns=queue_time_ns,
        device_time_ns=device_time_ns,
        start_time_ns=start_time_ns,
        end_time_ns=end_time_ns,
        recovery=json_from_column(recovery),
    )
