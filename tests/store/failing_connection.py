"""A connection to SQLite that fails on request."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable


class FailingConnection:
    """Passes statements on, and fails the n-th of a transaction's own."""

    def __init__(self, connection: sqlite3.Connection, failing: int) -> None:
        self._connection = connection
        self._left = failing

    def execute(self, sql: str, *arguments: object) -> sqlite3.Cursor:
        self._count(sql)
        return self._connection.execute(sql, *arguments)  # type: ignore[arg-type]

    def executemany(self, sql: str, rows: Iterable[tuple[object, ...]]) -> sqlite3.Cursor:
        self._count(sql)
        return self._connection.executemany(sql, rows)

    def _count(self, sql: str) -> None:
        if sql not in ("BEGIN IMMEDIATE", "ROLLBACK"):
            self._left -= 1
            if not self._left:
                raise sqlite3.OperationalError("disk I/O error")

    @property
    def in_transaction(self) -> bool:
        return self._connection.in_transaction
