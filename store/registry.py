"""The registry: which adapters exist, in which versions, under which ids.

One SQLite file, written by the host alone. What a method returned survives a crash and a power
cut (WAL with synchronous=FULL). Two numbers are never handed out twice, not even after what
they named was deleted, because engines keep what they once loaded: `lora_int_id` (a cached id
wins over what it now stands for, vllm/lora/worker_manager.py:296) and the version number.
They come from counters, not from the rows.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import sqlite3
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

SCHEMA_VERSION = 1
BUSY_TIMEOUT_S = 5.0
"""Wait for a lock that somebody's `sqlite3` shell holds on the file."""
NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
"""Names of tenants and adapters, as the contract has them."""

_DIGEST = re.compile(r"[0-9a-f]{64}")
_SCHEMA = """
CREATE TABLE lora_int_id (
    last INTEGER NOT NULL              -- one row
) STRICT;
INSERT INTO lora_int_id VALUES (0);

CREATE TABLE adapter (
    tenant       TEXT NOT NULL,
    adapter      TEXT NOT NULL,
    last_version INTEGER NOT NULL,
    PRIMARY KEY (tenant, adapter)
) STRICT, WITHOUT ROWID;

CREATE TABLE adapter_version (
    tenant         TEXT NOT NULL,
    adapter        TEXT NOT NULL,
    version        INTEGER NOT NULL,
    digest         TEXT NOT NULL,
    lora_int_id    INTEGER NOT NULL UNIQUE,
    create_time_ns INTEGER NOT NULL,   -- since the epoch
    PRIMARY KEY (tenant, adapter, version),
    UNIQUE (tenant, adapter, digest),
    FOREIGN KEY (tenant, adapter) REFERENCES adapter
) STRICT, WITHOUT ROWID;
"""

T = TypeVar("T")


class RegistryUnusable(Exception):
    """The file is no registry, or a newer release wrote it. The message says what to do."""


class InvalidName(ValueError):
    """A tenant or an adapter is not called by the rules."""

    def __init__(self, kind: str, name: str) -> None:
        super().__init__(
            f"{kind} {name!r} is no valid name; use 1 to 63 of a-z 0-9 . _ - and begin with a "
            "letter or a digit"
        )


class VersionUnknown(LookupError):
    """The registry holds no such version."""


@dataclass(frozen=True, slots=True)
class VersionRecord:
    """One version of an adapter, as registered."""

    tenant: str
    adapter: str
    version: int
    """From 1 up, per adapter."""
    digest: str
    """Of the adapter's files; see `store/artifacts.py`."""
    lora_int_id: int
    """Identifies the version to vLLM; from 1 up, over all tenants."""
    create_time_ns: int
    """When it was first registered, in nanoseconds since the epoch."""


class Registry:
    """The database behind an async seam: one thread owns the connection.

    Use as an async context manager, or `open` and `close` it. A call that is cancelled may
    still take effect. sqlite3.Error comes through when the disk fails or is full; then nothing
    of that call was written.
    """

    def __init__(self, path: Path, *, clock_ns: Callable[[], int] = time.time_ns) -> None:
        self._path = path
        self._clock_ns = clock_ns
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="registry")
        self._connection: sqlite3.Connection | None = None  # the thread's alone
        self._closed = False

    async def open(self) -> None:
        """Open the file, or make it. Raises RegistryUnusable."""
        await self._call(self._open)

    def _open(self) -> None:
        try:
            self._connection = _connect(self._path)
        except sqlite3.Error as error:
            raise RegistryUnusable(
                f"{self._path} cannot be used as registry ({error}); restore it from a backup, "
                "or choose another --state-dir"
            ) from error

    async def close(self) -> None:
        """Finish what runs and close the file. Safe to call twice."""
        if not self._closed:
            self._closed = True
            await self._call(self._close)
            self._thread.shutdown()  # returns at once: the thread has nothing left to do

    def _close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    async def __aenter__(self) -> Self:
        try:
            await self.open()
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def register(self, tenant: str, adapter: str, digest: str) -> VersionRecord:
        """The version of `adapter` with these files: the one that has them, or a new one.

        Raises InvalidName, or ValueError if `digest` is no lower-case hex SHA-256.
        """
        for kind, name in (("tenant", tenant), ("adapter", adapter)):
            if not NAME.fullmatch(name):
                raise InvalidName(kind, name)
        if not _DIGEST.fullmatch(digest):
            raise ValueError(f"not a digest: {digest!r}")
        now_ns = self._clock_ns()
        return await self._transact(lambda db: _register(db, tenant, adapter, digest, now_ns))

    async def mint_lora_int_id(self, tenant: str, adapter: str, version: int) -> int:
        """Give a version a fresh id, and return it.

        After a failed `add_lora` the old id may name half an adapter in the engine
        (vllm/lora/model_manager.py:363). Raises VersionUnknown.
        """
        return await self._transact(lambda db: _replace_lora_int_id(db, tenant, adapter, version))

    async def _transact(self, body: Callable[[sqlite3.Connection], T]) -> T:
        """Run `body` in the thread, as one transaction that is durable when this returns."""

        def run() -> T:
            if self._connection is None:
                raise RuntimeError("the registry is not open")
            with _transaction(self._connection):
                return body(self._connection)

        return await self._call(run)

    async def _call(self, function: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function)


def _connect(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, timeout=BUSY_TIMEOUT_S, isolation_level=None)
    try:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA foreign_keys = ON")
        with _transaction(connection):
            _migrate(connection, path)
    except BaseException:
        connection.close()
        raise
    return connection


def _migrate(connection: sqlite3.Connection, path: Path) -> None:
    (found,) = connection.execute("PRAGMA user_version").fetchone()
    if found == 0:
        # Not executescript: it would commit the transaction that makes this all or nothing.
        for statement in _SCHEMA.split(";"):
            connection.execute(statement)
        connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
    elif found != SCHEMA_VERSION:
        raise RegistryUnusable(
            f"{path} has schema {found}, and this release knows {SCHEMA_VERSION}; start the "
            "release that wrote it, or choose another --state-dir"
        )


@contextlib.contextmanager
def _transaction(connection: sqlite3.Connection) -> Iterator[None]:
    connection.execute("BEGIN IMMEDIATE")  # take the write lock first, never upgrade to it
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:  # a full disk makes SQLite roll back by itself
            connection.execute("ROLLBACK")
        raise


def _register(
    connection: sqlite3.Connection, tenant: str, adapter: str, digest: str, now_ns: int
) -> VersionRecord:
    found = connection.execute(
        "SELECT tenant, adapter, version, digest, lora_int_id, create_time_ns"
        " FROM adapter_version WHERE tenant = ? AND adapter = ? AND digest = ?",
        (tenant, adapter, digest),
    ).fetchone()
    if found is not None:
        return VersionRecord(*found)
    (version,) = connection.execute(
        "INSERT INTO adapter VALUES (?, ?, 1)"
        " ON CONFLICT DO UPDATE SET last_version = last_version + 1 RETURNING last_version",
        (tenant, adapter),
    ).fetchone()
    lora_int_id = _next_lora_int_id(connection)
    record = VersionRecord(tenant, adapter, version, digest, lora_int_id, now_ns)
    connection.execute(
        "INSERT INTO adapter_version"
        " (tenant, adapter, version, digest, lora_int_id, create_time_ns)"
        " VALUES (?, ?, ?, ?, ?, ?)",
        (tenant, adapter, version, digest, lora_int_id, now_ns),
    )
    return record


def _replace_lora_int_id(
    connection: sqlite3.Connection, tenant: str, adapter: str, version: int
) -> int:
    lora_int_id = _next_lora_int_id(connection)
    changed = connection.execute(
        "UPDATE adapter_version SET lora_int_id = ?"
        " WHERE tenant = ? AND adapter = ? AND version = ?",
        (lora_int_id, tenant, adapter, version),
    ).rowcount
    if not changed:
        raise VersionUnknown(f"{tenant}/{adapter} has no version {version}")
    return lora_int_id


def _next_lora_int_id(connection: sqlite3.Connection) -> int:
    (minted,) = connection.execute(
        "UPDATE lora_int_id SET last = last + 1 RETURNING last"
    ).fetchone()
    return int(minted)
