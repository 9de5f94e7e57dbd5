"""Traffic splits in the SQLite registry: each a row of its own, so that they can come back.

A row names the revision it replaced (`back_to`). A rollback is a row as well: it copies the arms
of the one it restores, and that row's own `back_to`, so that the next rollback goes one further.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence

from store.records import (
    AdapterRecord,
    Arm,
    EtagMismatch,
    EventKind,
    Guard,
    NothingToRollBack,
    VersionNotReady,
    VersionState,
)
from store.sqlite_adapters import read_adapter
from store.sqlite_columns import arms_from_column, arms_to_column, guard_to_column
from store.sqlite_events import Change
from store.sqlite_versions import read_version

WHOLE = 100
"""Weight of an arm that is alone; any would do, people read it as percent."""


def set_traffic(
    change: Change,
    tenant: str,
    adapter: str,
    arms: Sequence[Arm],
    guard: Guard | None,
    etag: str,
    reason: str,
) -> AdapterRecord:
    """See `Registry.set_traffic`."""
    found = _read_seen(change.db, tenant, adapter, etag)
    versions = {arm.version for arm in arms}
    if len(versions) < len(arms):
        raise ValueError(f"a version comes twice: {arms}")
    if any(arm.weight < 1 for arm in arms):
        raise ValueError(f"a weight is below 1: {arms}")
    if guard is not None and guard.version not in versions:
        raise ValueError(f"guard of version {guard.version}, which is no arm: {arms}")
    for version in sorted(versions):
        _check_ready(change.db, tenant, adapter, version)
    ordered = sorted(arms, key=lambda arm: arm.version)
    return _write(change, found, EventKind.TRAFFIC_SET, ordered, guard=guard, reason=reason)


def promote_version(
    change: Change, tenant: str, adapter: str, version: int, etag: str
) -> AdapterRecord:
    """See `Registry.promote`."""
    found = _read_seen(change.db, tenant, adapter, etag)
    _check_ready(change.db, tenant, adapter, version)
    return _write(change, found, EventKind.VERSION_PROMOTED, [Arm(version, WHOLE)])


def give_first_traffic(change: Change, tenant: str, adapter: str, version: int) -> AdapterRecord:
    """All traffic for a version that just became READY, if the split was never set."""
    found = read_adapter(change.db, tenant, adapter)
    if found.traffic_revision:
        return found
    arms = [Arm(version, WHOLE)]
    return _write(change, found, EventKind.TRAFFIC_SET, arms, reason="first READY version")


def roll_back(change: Change, tenant: str, adapter: str, etag: str, reason: str) -> AdapterRecord:
    """See `Registry.roll_back`."""
    found = _read_seen(change.db, tenant, adapter, etag)
    if not found.traffic_revision:
        raise NothingToRollBack(adapter, "its split was never set")
    _, target = _read_row(change.db, found, found.traffic_revision)
    if not target:
        raise NothingToRollBack(adapter, "there is no earlier split")
    arms, back_to = _read_row(change.db, found, target)
    try:
        for arm in arms:
            _check_ready(change.db, tenant, adapter, arm.version)
    except VersionNotReady as error:
        raise NothingToRollBack(
            adapter, f"{error}; choose a split with SetTraffic or PromoteVersion"
        ) from error
    return _write(
        change, found, EventKind.ADAPTER_ROLLED_BACK, arms, back_to=back_to, reason=reason
    )


def _read_seen(db: sqlite3.Connection, tenant: str, adapter: str, etag: str) -> AdapterRecord:
    """The adapter, if it is what the caller has seen."""
    found = read_adapter(db, tenant, adapter)
    if etag and etag != found.etag:
        raise EtagMismatch(adapter, found.etag)
    return found


def _check_ready(db: sqlite3.Connection, tenant: str, adapter: str, version: int) -> None:
    state = read_version(db, tenant, adapter, version).state
    if state is not VersionState.READY:
        raise VersionNotReady(adapter, version, state)


def _read_row(
    db: sqlite3.Connection, adapter: AdapterRecord, revision: int
) -> tuple[tuple[Arm, ...], int]:
    arms, back_to = db.execute(
        "SELECT arms, back_to FROM traffic WHERE tenant = ? AND adapter = ? AND revision = ?",
        (adapter.tenant, adapter.adapter, revision),
    ).fetchone()
    return arms_from_column(arms), back_to


def _write(
    change: Change,
    adapter: AdapterRecord,
    kind: EventKind,
    arms: Sequence[Arm],
    *,
    guard: Guard | None = None,
    back_to: int | None = None,
    reason: str = "",
) -> AdapterRecord:
    """The next revision of the split, and its event."""
    name = (adapter.tenant, adapter.adapter)
    (revision,) = change.db.execute(
        "UPDATE adapter SET traffic_revision = traffic_revision + 1"
        " WHERE tenant = ? AND adapter = ? RETURNING traffic_revision",
        name,
    ).fetchone()
    change.db.execute(
        "INSERT INTO traffic (tenant, adapter, revision, arms, guard, back_to, time_ns)"
        " VALUES (?, ?, ?, ?, ?, ?, ?)",
        (
            *name,
            revision,
            arms_to_column(arms),
            guard_to_column(guard),
            adapter.traffic_revision if back_to is None else back_to,
            change.time_ns,
        ),
    )
    change.tell(kind, *name, reason=reason, arms=arms)
    return read_adapter(change.db, *name)
