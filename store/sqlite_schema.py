"""The file of the SQLite registry: its tables, and a connection that has them."""

from __future__ import annotations

import contextlib
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path

from store.records import RegistryUnusable
from store.sqlite_job_schema import JOB_SCHEMA, QUEUE_SCHEMA, RECOVERY_SCHEMA
from store.sqlite_migration import migrate_1_to_2

SCHEMA_VERSION = 5
BUSY_TIMEOUT_S = 5.0
"""Wait for a lock that somebody's `sqlite3` shell holds on the file."""
BUSY_PAUSE_S = 0.01
"""Between two attempts, where SQLite does not wait by itself."""

SCHEMA = """
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
"""


def connect(path: Path, now_ns: int) -> sqlite3.Connection:
    """The file with the tables above: made, or brought up to date at `now_ns`.

    To be used by the calling thread alone. Raises RegistryUnusable and changes nothing if the
    file is damaged, something else, or of a newer release.
    """
    try:
        connection = sqlite3.connect(path, timeout=BUSY_TIMEOUT_S, isolation_level=None)
        try:
            _begin_wal(connection)
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute("PRAGMA foreign_keys = ON")
            _check(connection, path)
            with transaction(connection):
                _migrate(connection, path, now_ns)
        except BaseException:
            connection.close()
            raise
    except sqlite3.Error as error:
        raise _unusable(path, str(error)) from error
    return connection


def _begin_wal(connection: sqlite3.Connection) -> None:
    deadline_s = time.monotonic() + BUSY_TIMEOUT_S
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            # Of two that make the file at once, each may hold what the other needs. SQLite does
            # not wait then, or they would for ever.
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > deadline_s:
                raise
        time.sleep(BUSY_PAUSE_S)


@contextlib.contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[None]:
    """All or nothing of what is written inside, durable when it is left without an error."""
    connection.execute("BEGIN IMMEDIATE")  # take the write lock first, never upgrade to it
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:  # a full disk makes SQLite roll back by itself
            connection.execute("ROLLBACK")
        raise


@contextlib.contextmanager
def reading(connection: sqlite3.Connection) -> Iterator[None]:
    """One picture for all reads inside. Waits for no writer."""
    connection.execute("BEGIN")
    try:
        yield
    finally:
        if connection.in_transaction:
            connection.execute("ROLLBACK")


def _check(connection: sqlite3.Connection, path: Path) -> None:
    """Damage is found here, not by the request that meets it."""
    (found,) = connection.execute("PRAGMA quick_check(1)").fetchone()
    if found != "ok":
        raise _unusable(path, found.partition("\n")[0])


def _migrate(connection: sqlite3.Connection, path: Path, now_ns: int) -> None:
    (found,) = connection.execute("PRAGMA user_version").fetchone()
    if found == SCHEMA_VERSION:
        return
    (tables,) = connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()
    if found == 0 and not tables:
        _make(connection)
    elif found == 1:
        with migrate_1_to_2(connection, now_ns):
            _make(connection)
    elif 2 <= found < SCHEMA_VERSION:
        _extend(connection, found)
    elif found == 0:
        raise _unusable(path, "it is another program's database")
    else:
        raise RegistryUnusable(
            f"{path} has schema {found}, and this release knows {SCHEMA_VERSION}; start the "
            "release that wrote it, or choose another --state-dir"
        )
    connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")


def _make(connection: sqlite3.Connection) -> None:
    _run(connection, SCHEMA)
    _extend(connection, 2)


def _extend(connection: sqlite3.Connection, version: int) -> None:
    """Add what schemas after this version have more; 2 and those after it took nothing away."""
    for script in (JOB_SCHEMA, RECOVERY_SCHEMA, QUEUE_SCHEMA)[version - 2 :]:
        _run(connection, script)


def _run(connection: sqlite3.Connection, script: str) -> None:
    # Not executescript: it would commit the transaction that makes this all or nothing.
    for statement in script.split(";"):
        connection.execute(statement)


def _unusable(path: Path, why: str) -> RegistryUnusable:
    return RegistryUnusable(
        f"{path} cannot be used as registry ({why}); restore it from a backup, or choose "
        "another --state-dir"
    )
