"""A file as the release that knew schema 4 left it: as of schema 3, and a job that waits after a
loss."""

from __future__ import annotations

import contextlib
import sqlite3
from pathlib import Path

from tests.store.schema_3 import leave_schema_3

# That release put its column behind the others in a new file, too.
SCHEMA_4 = """
ALTER TABLE job ADD COLUMN recovery TEXT NOT NULL DEFAULT '{}';
PRAGMA user_version = 4;
"""
ROWS_4 = """
UPDATE counter SET last = 3 WHERE name = 'job';
INSERT INTO job VALUES
    (3, 'acme', 'three', 'u3', 'r3', '', 'sql', 'sea', '', '{}', '{}', '{}', '{}', 'queued', 'run',
     7, 1, 'cpu', 0, 1, '{"state":"pending"}', '{"step":4}', NULL, NULL, '[]', 1700, 1800, NULL,
     '{"spent":1}');
INSERT INTO job_event VALUES
    ('u3', 1, 'acme', 1700, 0, 'state_changed', '{"state":"validating"}');
"""


def leave_schema_4(path: Path) -> None:
    """Make the file."""
    leave_schema_3(path)
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.executescript(SCHEMA_4 + ROWS_4)
