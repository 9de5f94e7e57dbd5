"""The tables of the job store, new with schema 3 of the registry's file."""

from __future__ import annotations

JOB_SCHEMA = """
CREATE TABLE dataset (
    tenant         TEXT NOT NULL,
    name           TEXT NOT NULL,
    sha256         TEXT NOT NULL,
    size_bytes     INTEGER NOT NULL,
    format         TEXT NOT NULL,      -- empty: to be detected
    create_time_ns INTEGER NOT NULL,   -- since the epoch, as all times
    PRIMARY KEY (tenant, name)
) STRICT, WITHOUT ROWID;
CREATE INDEX dataset_by_sha256 ON dataset (sha256);

CREATE TABLE job (
    number         INTEGER PRIMARY KEY, -- in the order in which they were made
    tenant         TEXT NOT NULL,
    name           TEXT NOT NULL,
    uid            TEXT NOT NULL UNIQUE,
    request_id     TEXT NOT NULL,      -- empty if the caller gave none
    asked_name     TEXT NOT NULL,      -- empty: the name was made
    adapter        TEXT NOT NULL,
    dataset        TEXT NOT NULL,
    eval_dataset   TEXT NOT NULL,      -- empty: none
    spec           TEXT NOT NULL,      -- JSON
    effective_spec TEXT NOT NULL,      -- JSON
    fingerprints   TEXT NOT NULL,      -- JSON, of the base model that it was made for
    labels         TEXT NOT NULL,      -- JSON
    state          TEXT NOT NULL,      -- a JobState
    intent         TEXT NOT NULL,      -- an Intent
    epoch          INTEGER NOT NULL,
    attempt        INTEGER NOT NULL,
    device         TEXT NOT NULL,      -- of that attempt, empty before the first
    ingested_bytes INTEGER NOT NULL,
    last_sequence  INTEGER NOT NULL,
    publication    TEXT NOT NULL,      -- JSON
    progress       TEXT,               -- JSON, NULL before the first step
    manifest       TEXT,               -- JSON, NULL until the adapter is saved
    error          TEXT,               -- JSON, NULL unless it failed
    notices        TEXT NOT NULL,      -- JSON
    create_time_ns INTEGER NOT NULL,
    start_time_ns  INTEGER,            -- NULL until a training process was started
    end_time_ns    INTEGER,            -- NULL until it has ended
    UNIQUE (tenant, name)
) STRICT;
CREATE INDEX job_by_tenant ON job (tenant, number);
CREATE INDEX job_by_adapter ON job (tenant, adapter, number);
CREATE INDEX job_active ON job (number) WHERE end_time_ns IS NULL;
CREATE UNIQUE INDEX job_by_request ON job (tenant, request_id) WHERE request_id <> '';

CREATE TABLE job_event (
    uid      TEXT NOT NULL REFERENCES job (uid),
    sequence INTEGER NOT NULL,         -- from 1 up within the job, without a gap
    tenant   TEXT NOT NULL,
    time_ns  INTEGER NOT NULL,
    attempt  INTEGER NOT NULL,
    kind     TEXT NOT NULL,            -- an EventKind
    payload  TEXT NOT NULL,            -- JSON
    PRIMARY KEY (uid, sequence)
) STRICT, WITHOUT ROWID;
"""

RECOVERY_SCHEMA = """
ALTER TABLE job ADD COLUMN recovery TEXT NOT NULL DEFAULT '{}'
"""
"""What schema 4 has more, JSON; a column behind the others, in a new file too."""

QUEUE_SCHEMA = """
ALTER TABLE job ADD COLUMN priority INTEGER NOT NULL DEFAULT 0;
ALTER TABLE job ADD COLUMN queue_time_ns INTEGER;
ALTER TABLE job ADD COLUMN device_time_ns INTEGER;
CREATE TABLE device_use (
    tenant        TEXT NOT NULL,
    priority      INTEGER NOT NULL,
    used_s        REAL NOT NULL,       -- not forgotten at time_ns
    time_ns       INTEGER NOT NULL,
    grant_time_ns INTEGER NOT NULL,    -- 0: never
    PRIMARY KEY (tenant, priority)
) STRICT, WITHOUT ROWID
"""
"""What schema 5 has more. The times are NULL of a job that was not QUEUED since, or has no device.
"""
