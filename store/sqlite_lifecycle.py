"""A version's way through its states in the SQLite registry, by TRANSITIONS of the records."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from store.records import (
    DIGEST,
    TRANSITIONS,
    AdapterRecord,
    Content,
    EventKind,
    TransitionRefused,
    VersionInUse,
    VersionRecord,
    VersionState,
)
from store.sqlite_adapters import read_adapter
from store.sqlite_events import Change
from store.sqlite_traffic import give_first_traffic
from store.sqlite_versions import read_version, write_version

_EVENTS = {
    VersionState.READY: EventKind.VERSION_READY,
    VersionState.FAILED: EventKind.VERSION_FAILED,
    VersionState.DRAINING: EventKind.VERSION_DRAINING,
    VersionState.DELETED: EventKind.VERSION_DELETED,
}


def complete_version(
    change: Change, tenant: str, adapter: str, version: int, content: Content
) -> tuple[VersionRecord, AdapterRecord]:
    """See `Registry.complete_version`."""
    if not DIGEST.fullmatch(content.digest):
        raise ValueError(f"not a digest: {content.digest!r}")
    found = read_version(change.db, tenant, adapter, version)
    ready = _move(change, replace(found, content=content), VersionState.READY)
    if ready.take_traffic:
        return ready, give_first_traffic(change, tenant, adapter, version)
    return ready, read_adapter(change.db, tenant, adapter)


def fail_version(
    change: Change, tenant: str, adapter: str, version: int, findings: Sequence[str]
) -> VersionRecord:
    """See `Registry.fail_version`."""
    found = read_version(change.db, tenant, adapter, version)
    refused = replace(found, findings=tuple(findings))
    return _move(change, refused, VersionState.FAILED, reason="; ".join(findings))


def drain_version(change: Change, tenant: str, adapter: str, version: int) -> VersionRecord:
    """See `Registry.drain_version`."""
    found = read_version(change.db, tenant, adapter, version)
    if found.state in (VersionState.DRAINING, VersionState.FAILED, VersionState.DELETED):
        return found
    arms = read_adapter(change.db, tenant, adapter).arms
    if any(arm.version == version for arm in arms):
        raise VersionInUse(adapter, version)
    return _move(change, found, VersionState.DRAINING)


def delete_version(change: Change, tenant: str, adapter: str, version: int) -> VersionRecord:
    """See `Registry.delete_version`."""
    found = read_version(change.db, tenant, adapter, version)
    if found.state is VersionState.DELETED:
        return found
    return _move(change, found, VersionState.DELETED)


def _move(
    change: Change, record: VersionRecord, state: VersionState, *, reason: str = ""
) -> VersionRecord:
    """Put a version into another state, with what else `record` says of it, and tell."""
    if state not in TRANSITIONS[record.state]:
        raise TransitionRefused(record, state)
    moved = replace(record, state=state, update_time_ns=change.time_ns)
    write_version(change.db, moved)
    name = (record.tenant, record.adapter)
    change.tell(_EVENTS[state], *name, version=record.version, reason=reason)
    return read_version(change.db, *name, record.version)
