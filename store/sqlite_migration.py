"""From schema 1 of the SQLite registry, which knew neither states nor splits, to schema 2.

All versions of schema 1 had been checked and could be served, so they are READY; the newest of
an adapter answered, so it has the traffic. What schema 1 did not keep (where a version came
from, its size, its rank) stays unknown: empty, or 0.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator

# The children first: the tables that they refer to cannot go before them.
_OLD_TABLES = ("adapter_version", "adapter", "lora_int_id")

_ADAPTERS = """
INSERT INTO adapter (tenant, adapter, last_version, traffic_revision, create_time_ns)
SELECT a.tenant, a.adapter, a.last_version, count(v.version) > 0,
       coalesce(min(v.create_time_ns), :now_ns)
FROM adapter_1 AS a LEFT JOIN adapter_version_1 AS v USING (tenant, adapter)
GROUP BY a.tenant, a.adapter
"""

_VERSIONS = """
INSERT INTO adapter_version (
    tenant, adapter, version, state, lora_int_id, request_id, source_uri, expected_sha256,
    fingerprints, labels, take_traffic, create_time_ns, update_time_ns,
    digest, weights_sha256, size_bytes, rank, target_modules, findings
)
SELECT tenant, adapter, version, 'ready', lora_int_id, '', '', '',
       '{}', '{}', 1, create_time_ns, :now_ns,
       digest, '', 0, 0, '[]', '[]'
FROM adapter_version_1
"""

_TRAFFIC = """
INSERT INTO traffic (tenant, adapter, revision, arms, guard, back_to, time_ns)
SELECT tenant, adapter, 1, '[[' || max(version) || ',100]]', NULL, 0, :now_ns
FROM adapter_version_1
GROUP BY tenant, adapter
"""

# A version was created when schema 1 says so; all else becomes so now.
_EVENTS = """
WITH change (step, time_ns, kind, tenant, adapter, version, arms) AS (
    SELECT 1, create_time_ns, 'version_created', tenant, adapter, version, '[]'
    FROM adapter_version_1
    UNION ALL
    SELECT 2, :now_ns, 'version_ready', tenant, adapter, version, '[]'
    FROM adapter_version_1
    UNION ALL
    SELECT 3, time_ns, 'traffic_set', tenant, adapter, 0, arms
    FROM traffic
)
INSERT INTO event (sequence, time_ns, kind, tenant, adapter, version, actor, reason, arms)
SELECT row_number() OVER (ORDER BY step, time_ns, tenant, adapter, version),
       time_ns, kind, tenant, adapter, version, 'gateway', 'taken over from schema 1', arms
FROM change
"""

_COUNTERS = """
UPDATE counter SET last = CASE name
    WHEN 'lora_int_id' THEN (SELECT last FROM lora_int_id_1)
    ELSE (SELECT count(*) FROM event)
END
"""


@contextlib.contextmanager
def migrate_1_to_2(connection: sqlite3.Connection, now_ns: int) -> Iterator[None]:
    """Fill the tables of schema 2, which the caller makes inside, from those of schema 1.

    Runs in the caller's transaction.
    """
    for table in _OLD_TABLES:
        connection.execute(f"ALTER TABLE {table} RENAME TO {table}_1")
    yield
    for statement in (_ADAPTERS, _VERSIONS, _TRAFFIC, _EVENTS, _COUNTERS):
        connection.execute(statement, {"now_ns": now_ns} if ":now_ns" in statement else {})
    for table in _OLD_TABLES:
        connection.execute(f"DROP TABLE {table}_1")
