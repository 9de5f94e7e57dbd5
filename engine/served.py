"""A version of the registry as engines know it: its key, its name in a log, what is loaded."""

from __future__ import annotations

from pathlib import Path

from engine.generation import ServedVersion, VersionKey
from store.records import VersionRecord


def key_of(record: VersionRecord) -> VersionKey:
    """Which version this is."""
    return VersionKey(record.tenant, record.adapter, record.version)


def name_of(record: VersionRecord) -> str:
    """For people."""
    return f"adapter {record.adapter} version {record.version}"


def served(record: VersionRecord, digest: str, path: Path) -> ServedVersion:
    """To be loaded, with these files."""
    return ServedVersion(
        tenant=record.tenant,
        adapter=record.adapter,
        version=record.version,
        lora_int_id=record.lora_int_id,
        path=str(path),
        digest=digest,
    )
