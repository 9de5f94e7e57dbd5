"""How a job is made in the SQLite job store, and found again by the request that made it."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from store.job_records import Intent, JobExists, JobRecord, JobState, NewJob, QueueFull
from store.job_transitions import state_changed
from store.records import NAME, InvalidName, RequestIdReused
from store.sqlite_columns import json_to_column, mapping_to_column
from store.sqlite_datasets import read_dataset
from store.sqlite_job_events import write_job_events
from store.sqlite_job_rows import count_active_jobs, read_job, update_job

# A counter, because SQLite's own numbers are used again when the newest row is deleted, and a page
# of a list begins below the number of the last job of the page before. It is made by the first job
# after its release, or goes on where a release that has none has made jobs meanwhile.
_COUNT_UP = """
INSERT INTO counter (name, last) SELECT 'job', coalesce(max(number), 0) + 1 FROM job WHERE true
ON CONFLICT (name) DO UPDATE SET last = max(counter.last + 1, excluded.last) RETURNING last
"""
_SUFFIX_CHARACTERS = 6
_STEM_CHARACTERS = 56
"""Of a name that is made: NAME has 63, and the dash and the suffix need 7."""


@dataclass(frozen=True, slots=True)
class Creation:
    """What `JobStore.create_job` was given."""

    new: NewJob
    effective_spec: Mapping[str, Any]
    fingerprints: Mapping[str, str]
    publication: Mapping[str, Any]
    request_id: str
    max_active: int
    uid: str = ""


def create_job(
    db: sqlite3.Connection, creation: Creation, now_ns: int, make_uid: Callable[[], str]
) -> JobRecord:
    """See `JobStore.create_job`."""
    new = creation.new
    _check_names(new)
    made = made_before(db, new, creation.request_id)
    if made is not None:
        return made
    if new.name and _exists(db, new.tenant, new.name):
        raise JobExists(new.name)
    for dataset in filter(None, (new.dataset, new.eval_dataset)):
        read_dataset(db, new.tenant, dataset)
    if count_active_jobs(db) >= creation.max_active:
        raise QueueFull(creation.max_active)
    uid = creation.uid or make_uid()
    name = new.name or _name(new.adapter, uid)
    while not new.name and _exists(db, new.tenant, name):
        suffix = make_uid()
        uid = creation.uid or suffix
        name = _name(new.adapter, suffix)
    _insert(db, creation, name, uid, now_ns)
    events = [state_changed(None, JobState.VALIDATING)]
    update_job(db, write_job_events(db, read_job(db, new.tenant, name), events, now_ns))
    return read_job(db, new.tenant, name)


def _check_names(new: NewJob) -> None:
    for kind, name in (("tenant", new.tenant), ("adapter", new.adapter), ("job", new.name)):
        if not (NAME.fullmatch(name) or (kind == "job" and not name)):
            raise InvalidName(kind, name)


def made_before(db: sqlite3.Connection, new: NewJob, request_id: str) -> JobRecord | None:
    """The job that the request made, if it is not the first time that it comes."""
    # `<> ''` is what lets SQLite use the index.
    row = db.execute(
        "SELECT name, asked_name, adapter, dataset, eval_dataset, spec, labels, priority FROM job"
        " WHERE tenant = ? AND request_id = ? AND request_id <> ''",
        (new.tenant, request_id),
    ).fetchone()
    if row is None:
        return None
    name, *asked_for = row
    if asked_for != _asked_for(new):
        raise RequestIdReused(request_id)
    return read_job(db, new.tenant, name)


def _asked_for(new: NewJob) -> list[str | int]:
    """What has to be the same for a request to be the same, as its columns hold it."""
    return [
        new.name,
        new.adapter,
        new.dataset,
        new.eval_dataset,
        json_to_column(new.spec),
        json_to_column(new.labels),
        new.priority,
    ]


def _insert(db: sqlite3.Connection, creation: Creation, name: str, uid: str, now_ns: int) -> None:
    (number,) = db.execute(_COUNT_UP).fetchone()
    db.execute(
        "INSERT INTO job ("
        " number, asked_name, adapter, dataset, eval_dataset, spec, labels, priority,"
        " tenant, name, uid, request_id, effective_spec, fingerprints, state, intent, epoch,"
        " attempt, device, ingested_bytes, last_sequence, publication, notices, create_time_ns"
        ") VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, 1, 0, '', 0, 0, ?, '[]', ?)",
        (
            number,
            *_asked_for(creation.new),
            creation.new.tenant,
            name,
            uid,
            creation.request_id,
            json_to_column(creation.effective_spec),
            mapping_to_column(creation.fingerprints),
            JobState.VALIDATING.value,
            Intent.RUN.value,
            json_to_column(creation.publication),
            now_ns,
        ),
    )


def _name(adapter: str, uid: str) -> str:
    return f"{adapter[:_STEM_CHARACTERS]}-{uid[:_SUFFIX_CHARACTERS]}"


def _exists(db: sqlite3.Connection, tenant: str, name: str) -> bool:
    row = db.execute("SELECT 1 FROM job WHERE tenant = ? AND name = ?", (tenant, name))
    return row.fetchone() is not None
