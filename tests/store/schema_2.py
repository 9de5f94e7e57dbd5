"""A file of schema 2, as the release that knew it wrote it."""

from __future__ import annotations

import contextlib
import sqlite3
from pathlib import Path

from tests.store.registry_steps import ONE

SCHEMA_2 = """
CREATE TABLE counter (
    name TEXT NOT NULL PRIMARY KEY,    -- lora_int_id, event
    last INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
INSERT INTO counter VALUES ('lora_int_id', 0), ('event', 0);

CREATE TABLE adapter (
    tenant           TEXT NOT NULL,
    adapter          TEXT NOT NULL,
    last_version     INTEGER NOT NULL,
    traffic_revision INTEGER NOT NULL, -- 0 before the first split
    create_time_ns   INTEGER NOT NULL, -- since the epoch, as all times
    PRIMARY KEY (tenant, adapter)
) STRICT, WITHOUT ROWID;

CREATE TABLE adapter_version (
    tenant          TEXT NOT NULL,
    adapter         TEXT NOT NULL,
    version         INTEGER NOT NULL,
    state           TEXT NOT NULL,     -- a VersionState
    lora_int_id     INTEGER NOT NULL UNIQUE,
    request_id      TEXT NOT NULL,     -- empty if the caller gave none
    source_uri      TEXT NOT NULL,
    expected_sha256 TEXT NOT NULL,
    fingerprints    TEXT NOT NULL,     -- JSON
    labels          TEXT NOT NULL,     -- JSON
    take_traffic    INTEGER NOT NULL,
    create_time_ns  INTEGER NOT NULL,
    update_time_ns  INTEGER NOT NULL,
    digest          TEXT,              -- NULL until the files were read, as the next four
    weights_sha256  TEXT,
    size_bytes      INTEGER,
    rank            INTEGER,
    target_modules  TEXT,              -- JSON
    findings        TEXT NOT NULL,     -- JSON
    PRIMARY KEY (tenant, adapter, version),
    FOREIGN KEY (tenant, adapter) REFERENCES adapter
) STRICT;
CREATE INDEX version_by_state ON adapter_version (state, tenant, adapter, version);
CREATE INDEX version_by_digest ON adapter_version (digest, tenant, adapter, version)
    WHERE digest IS NOT NULL;
CREATE UNIQUE INDEX version_by_request ON adapter_version (tenant, request_id)
    WHERE request_id <> '';

CREATE TABLE traffic (
    tenant   TEXT NOT NULL,
    adapter  TEXT NOT NULL,
    revision INTEGER NOT NULL,
    arms     TEXT NOT NULL,            -- JSON
    guard    TEXT,                     -- JSON, NULL for none
    back_to  INTEGER NOT NULL,         -- revision that a rollback restores, 0 for none
    time_ns  INTEGER NOT NULL,
    PRIMARY KEY (tenant, adapter, revision),
    FOREIGN KEY (tenant, adapter) REFERENCES adapter
) STRICT, WITHOUT ROWID;

CREATE TABLE event (
    sequence INTEGER PRIMARY KEY,      -- from the counter, because AUTOINCREMENT may skip
    time_ns  INTEGER NOT NULL,
    kind     TEXT NOT NULL,            -- an EventKind
    tenant   TEXT NOT NULL,
    adapter  TEXT NOT NULL,
    version  INTEGER NOT NULL,
    actor    TEXT NOT NULL,
    reason   TEXT NOT NULL,
    arms     TEXT NOT NULL             -- JSON
) STRICT;
CREATE INDEX event_by_tenant ON event (tenant, sequence);
CREATE INDEX event_by_adapter ON event (tenant, adapter, sequence);

CREATE TABLE feedback (
    tenant     TEXT NOT NULL,
    request_id TEXT NOT NULL,
    adapter    TEXT NOT NULL,
    version    INTEGER NOT NULL,
    score      REAL NOT NULL,
    PRIMARY KEY (tenant, request_id),
    FOREIGN KEY (tenant, adapter, version) REFERENCES adapter_version
) STRICT, WITHOUT ROWID;
CREATE INDEX feedback_by_version ON feedback (tenant, adapter, version, score);
PRAGMA user_version = 2;
"""
ROWS_2 = f"""
INSERT INTO adapter VALUES ('acme', 'sql', 2, 1, 1000);
INSERT INTO adapter_version VALUES
    ('acme', 'sql', 1, 'ready', 7, 'r', 'file:///a', '', '{{}}', '{{"of":"sea"}}', 1, 1000, 2000,
     '{ONE}', '{ONE}', 12, 8, '["q_proj"]', '[]'),
    ('acme', 'sql', 2, 'failed', 8, '', 'file:///b', '', '{{}}', '{{}}', 0, 3000, 3000,
     NULL, NULL, NULL, NULL, NULL, '["bad"]');
INSERT INTO traffic VALUES ('acme', 'sql', 1, '[[1,100]]', NULL, 0, 2000);
INSERT INTO event VALUES
    (1, 1000, 'version_created', 'acme', 'sql', 1, 'cli', '', '[]'),
    (2, 2000, 'version_ready', 'acme', 'sql', 1, 'cli', '', '[]');
INSERT INTO feedback VALUES ('acme', 'q', 'sql', 1, 0.5);
UPDATE counter SET last = CASE name WHEN 'event' THEN 2 ELSE 8 END;
"""


def leave_schema_2(path: Path) -> None:
    """Make the file."""
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.executescript(SCHEMA_2 + ROWS_2)
