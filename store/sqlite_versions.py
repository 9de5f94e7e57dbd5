"""Versions in the SQLite registry: made once, read many ways."""

from __future__ import annotations

import sqlite3
from typing import Any

from store.records import (
    NAME,
    AdapterUnknown,
    Content,
    EventKind,
    InvalidName,
    NewVersion,
    RequestIdReused,
    VersionRecord,
    VersionState,
    VersionUnknown,
)
from store.sqlite_adapters import adapter_exists
from store.sqlite_columns import (
    mapping_from_column,
    mapping_to_column,
    storable,
    texts_from_column,
    texts_to_column,
)
from store.sqlite_events import MAX_INTEGER, Change, count_up

_SELECT = """
SELECT tenant, adapter, version, state, lora_int_id, source_uri, expected_sha256, fingerprints,
       labels, take_traffic, create_time_ns, update_time_ns, findings,
       digest, weights_sha256, size_bytes, rank, target_modules
FROM adapter_version
"""


def begin_version(change: Change, new: NewVersion, request_id: str) -> VersionRecord:
    """See `Registry.begin_version`."""
    for kind, name in (("tenant", new.tenant), ("adapter", new.adapter)):
        if not NAME.fullmatch(name):
            raise InvalidName(kind, name)
    made = version_of_request(change.db, new.tenant, request_id)
    if made is not None:
        if _asked_for(made) != new:
            raise RequestIdReused(request_id)
        return made
    (version,) = change.db.execute(
        "INSERT INTO adapter (tenant, adapter, last_version, traffic_revision, create_time_ns)"
        " VALUES (?, ?, 1, 0, ?)"
        " ON CONFLICT DO UPDATE SET last_version = last_version + 1 RETURNING last_version",
        (new.tenant, new.adapter, change.time_ns),
    ).fetchone()
    change.db.execute(
        "INSERT INTO adapter_version ("
        " tenant, adapter, version, state, lora_int_id, request_id, source_uri, expected_sha256,"
        " fingerprints, labels, take_traffic, create_time_ns, update_time_ns, findings"
        ") VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, '[]')",
        (
            new.tenant,
            new.adapter,
            version,
            VersionState.VALIDATING.value,
            count_up(change.db, "lora_int_id"),
            request_id,
            new.source_uri,
            new.expected_sha256,
            mapping_to_column(new.fingerprints),
            mapping_to_column(new.labels),
            new.take_traffic,
            change.time_ns,
            change.time_ns,
        ),
    )
    change.tell(EventKind.VERSION_CREATED, new.tenant, new.adapter, version=version)
    return read_version(change.db, new.tenant, new.adapter, version)


def write_version(db: sqlite3.Connection, record: VersionRecord) -> None:
    """Store what may change of a version: its state, and what was learned of its files."""
    content = record.content
    db.execute(
        "UPDATE adapter_version SET state = ?, update_time_ns = ?, findings = ?,"
        " digest = ?, weights_sha256 = ?, size_bytes = ?, rank = ?, target_modules = ?"
        " WHERE tenant = ? AND adapter = ? AND version = ?",
        (
            record.state.value,
            record.update_time_ns,
            texts_to_column(map(storable, record.findings)),
            content and content.digest,
            content and content.weights_sha256,
            content and content.size_bytes,
            content and content.rank,
            content and texts_to_column(content.target_modules),
            record.tenant,
            record.adapter,
            record.version,
        ),
    )


def mint_lora_int_id(db: sqlite3.Connection, tenant: str, adapter: str, version: int) -> int:
    """See `Registry.mint_lora_int_id`."""
    read_version(db, tenant, adapter, version)
    lora_int_id = count_up(db, "lora_int_id")
    db.execute(
        "UPDATE adapter_version SET lora_int_id = ?"
        " WHERE tenant = ? AND adapter = ? AND version = ?",
        (lora_int_id, tenant, adapter, version),
    )
    return lora_int_id


def read_version(db: sqlite3.Connection, tenant: str, adapter: str, version: int) -> VersionRecord:
    """See `Registry.version`."""
    row = db.execute(
        f"{_SELECT} WHERE tenant = ? AND adapter = ? AND version = ?", (tenant, adapter, version)
    )
    found = row.fetchone()
    if found is not None:
        return _record(found)
    if adapter_exists(db, tenant, adapter):
        raise VersionUnknown(adapter, version)
    raise AdapterUnknown(adapter)


def list_versions(
    db: sqlite3.Connection,
    tenant: str,
    adapter: str,
    below: int | None,
    limit: int,
    deleted: bool,
) -> list[VersionRecord]:
    """See `Registry.versions`."""
    if not adapter_exists(db, tenant, adapter):
        raise AdapterUnknown(adapter)
    rows = db.execute(
        f"{_SELECT} WHERE tenant = ? AND adapter = ? AND version < ? AND (? OR state <> ?)"
        " ORDER BY version DESC LIMIT ?",
        (
            tenant,
            adapter,
            MAX_INTEGER if below is None else below,
            deleted,
            VersionState.DELETED.value,
            limit,
        ),
    )
    return [_record(row) for row in rows]


def versions_in(db: sqlite3.Connection, state: VersionState) -> list[VersionRecord]:
    """See `Registry.versions_in`."""
    rows = db.execute(
        f"{_SELECT} WHERE state = ? ORDER BY tenant, adapter, version", (state.value,)
    )
    return [_record(row) for row in rows]


def find_ready(
    db: sqlite3.Connection, tenant: str, adapter: str, digest: str
) -> VersionRecord | None:
    """See `Registry.find_ready`."""
    row = db.execute(
        f"{_SELECT} WHERE digest = ? AND tenant = ? AND adapter = ? AND state = ?"
        " ORDER BY version DESC LIMIT 1",
        (digest, tenant, adapter, VersionState.READY.value),
    )
    found = row.fetchone()
    return None if found is None else _record(found)


def version_of_request(
    db: sqlite3.Connection, tenant: str, request_id: str
) -> VersionRecord | None:
    """See `Registry.version_of_request`."""
    # `<> ''` is what lets SQLite use the index.
    row = db.execute(
        f"{_SELECT} WHERE tenant = ? AND request_id = ? AND request_id <> ''",
        (tenant, request_id),
    )
    found = row.fetchone()
    return None if found is None else _record(found)


def digest_in_use(db: sqlite3.Connection, digest: str) -> bool:
    """See `Registry.digest_in_use`."""
    row = db.execute(
        "SELECT 1 FROM adapter_version WHERE digest = ? AND state NOT IN (?, ?) LIMIT 1",
        (digest, VersionState.FAILED.value, VersionState.DELETED.value),
    )
    return row.fetchone() is not None


def _asked_for(record: VersionRecord) -> NewVersion:
    return NewVersion(
        tenant=record.tenant,
        adapter=record.adapter,
        source_uri=record.source_uri,
        expected_sha256=record.expected_sha256,
        fingerprints=record.fingerprints,
        labels=record.labels,
        take_traffic=record.take_traffic,
    )


def _record(row: tuple[Any, ...]) -> VersionRecord:
    (
        tenant,
        adapter,
        version,
        state,
        lora_int_id,
        source_uri,
        expected_sha256,
        fingerprints,
        labels,
        take_traffic,
        create_time_ns,
        update_time_ns,
        findings,
        digest,
        weights_sha256,
        size_bytes,
        rank,
        target_modules,
    ) = row
    content = None
    if digest is not None:
        modules = texts_from_column(target_modules)
        content = Content(digest, weights_sha256, size_bytes, rank, modules)
    return VersionRecord(
        tenant=tenant,
        adapter=adapter,
        version=version,
        state=VersionState(state),
        lora_int_id=lora_int_id,
        source_uri=source_uri,
        expected_sha256=expected_sha256,
        fingerprints=mapping_from_column(fingerprints),
        labels=mapping_from_column(labels),
        take_traffic=bool(take_traffic),
        create_time_ns=create_time_ns,
        update_time_ns=update_time_ns,
        content=content,
        findings=texts_from_column(findings),
    )
