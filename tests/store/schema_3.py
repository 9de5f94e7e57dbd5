"""A file as the release that knew schema 3 left it: with a job that trains, and one that failed."""

from __future__ import annotations

import contextlib
import sqlite3
from pathlib import Path

from tests.store.registry_steps import ONE
from tests.store.schema_2 import ROWS_2, SCHEMA_2

SCHEMA_3 = f"""
{SCHEMA_2}
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
PRAGMA user_version = 3;
"""
ROWS_3 = f"""
{ROWS_2}
INSERT INTO counter VALUES ('job', 2);
INSERT INTO dataset VALUES ('acme', 'sea', '{ONE}', 12, 'chat', 900);
INSERT INTO job VALUES
    (1, 'acme', 'one', 'u1', 'r1', 'one', 'sql', 'sea', '', '{{"dataset":"sea"}}',
     '{{"dataset":"sea","seed":7}}', '{{"w":"1"}}', '{{"of":"sea"}}', 'running', 'cancel', 4, 1,
     'cpu', 70, 5, '{{"state":"pending"}}', '{{"step":1}}', NULL, NULL, '[{{"code":"N"}}]',
     1000, 2000, NULL),
    (2, 'acme', 'two', 'u2', '', '', 'sql', 'sea', '', '{{}}', '{{}}', '{{}}', '{{}}', 'failed',
     'run', 3, 1, 'cpu', 0, 1, '{{}}', NULL, NULL, '{{"reason":"TRAINER_LOST"}}', '[]',
     1500, 2500, 3000);
INSERT INTO job_event VALUES
    ('u1', 1, 'acme', 1000, 0, 'state_changed', '{{"state":"validating"}}'),
    ('u1', 2, 'acme', 1100, 0, 'state_changed', '{{"state":"queued"}}'),
    ('u1', 3, 'acme', 2000, 1, 'state_changed', '{{"state":"preparing"}}'),
    ('u1', 4, 'acme', 2100, 1, 'state_changed', '{{"state":"running"}}'),
    ('u1', 5, 'acme', 2200, 1, 'progress', '{{"step":1}}'),
    ('u2', 1, 'acme', 1500, 0, 'state_changed', '{{"state":"validating"}}');
"""


def leave_schema_3(path: Path) -> None:
    """Make the file."""
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.executescript(SCHEMA_3 + ROWS_3)
