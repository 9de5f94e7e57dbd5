"""The trail of changes in the SQLite registry: one event for each, in the same transaction."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass

from store.records import Arm, EventKind, EventRecord
from store.sqlite_columns import arms_from_column, arms_to_column, storable

MAX_INTEGER = 2**63 - 1
"""The largest that SQLite compares; the contract's sequence numbers go one bit higher."""


@dataclass(frozen=True, slots=True)
class Change:
    """A transaction that changes something, with what all of its events share."""

    db: sqlite3.Connection
    actor: str
    time_ns: int
    """Since the epoch."""

    def tell(
        self,
        kind: EventKind,
        tenant: str,
        adapter: str,
        *,
        version: int = 0,
        reason: str = "",
        arms: Sequence[Arm] = (),
    ) -> None:
        """Write one event. `version` is 0 for a change of the split, `arms` is that split."""
        self.db.execute(
            "INSERT INTO event"
            " (sequence, time_ns, kind, tenant, adapter, version, actor, reason, arms)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                count_up(self.db, "event"),
                self.time_ns,
                kind.value,
                tenant,
                adapter,
                version,
                storable(self.actor),
                storable(reason),
                arms_to_column(arms),
            ),
        )


def count_up(db: sqlite3.Connection, counter: str) -> int:
    """The next number of a counter, from 1 up. Given back if the transaction fails."""
    (number,) = db.execute(
        "UPDATE counter SET last = last + 1 WHERE name = ? RETURNING last", (counter,)
    ).fetchone()
    return int(number)


def list_events(
    db: sqlite3.Connection, tenant: str, adapter: str, after: int, limit: int
) -> list[EventRecord]:
    """See `Registry.events`."""
    of_adapter, names = (" AND adapter = ?", (tenant, adapter)) if adapter else ("", (tenant,))
    rows = db.execute(
        "SELECT sequence, time_ns, kind, tenant, adapter, version, actor, reason, arms"
        f" FROM event WHERE tenant = ?{of_adapter} AND sequence > ?"
        " ORDER BY sequence LIMIT ?",
        (*names, min(after, MAX_INTEGER), limit),
    )
    return [
        EventRecord(
            sequence=sequence,
            time_ns=time_ns,
            kind=EventKind(kind),
            tenant=tenant,
            adapter=name,
            version=version,
            actor=actor,
            reason=reason,
            arms=arms_from_column(arms),
        )
        for sequence, time_ns, kind, tenant, name, version, actor, reason, arms in rows
    ]


def last_sequence(db: sqlite3.Connection) -> int:
    """See `Registry.last_sequence`."""
    (last,) = db.execute("SELECT last FROM counter WHERE name = 'event'").fetchone()
    return int(last)
