"""Scores of answers in the SQLite registry: one for a request, summed up for a version."""

from __future__ import annotations

import math
import sqlite3

from store.records import FeedbackSummary
from store.sqlite_versions import read_version

# Scaled to -1..1, because scores are any finite numbers and their squares need not be finite.
_SUMMARIES = """
WITH scale AS (
    SELECT max(max(abs(score)), 1e-300) AS scale
    FROM feedback WHERE tenant = :tenant AND adapter = :adapter
),
scaled AS (
    SELECT version, score / scale AS score, scale
    FROM feedback, scale WHERE tenant = :tenant AND adapter = :adapter
),
mean AS (
    SELECT version, avg(score) AS mean FROM scaled GROUP BY version
)
SELECT version, count(*), mean, total((score - mean) * (score - mean)), scale
FROM scaled JOIN mean USING (version)
GROUP BY version ORDER BY version
"""


def record_feedback(
    db: sqlite3.Connection,
    tenant: str,
    adapter: str,
    version: int,
    request_id: str,
    score: float,
) -> None:
    """See `Registry.record_feedback`."""
    if not math.isfinite(score):
        raise ValueError(f"not a score: {score}")
    read_version(db, tenant, adapter, version)
    db.execute(
        "INSERT INTO feedback (tenant, request_id, adapter, version, score)"
        " VALUES (?, ?, ?, ?, ?)"
        " ON CONFLICT DO UPDATE SET adapter = excluded.adapter, version = excluded.version,"
        " score = excluded.score",
        (tenant, request_id, adapter, version, score),
    )


def summarize_feedback(
    db: sqlite3.Connection, tenant: str, adapter: str
) -> dict[int, FeedbackSummary]:
    """See `Registry.feedback`."""
    return {
        version: FeedbackSummary(
            count=count,
            mean=mean * scale,
            standard_deviation=math.sqrt(squares / (count - 1)) * scale if count > 1 else 0.0,
        )
        for version, count, mean, squares, scale in db.execute(
            _SUMMARIES, {"tenant": tenant, "adapter": adapter}
        )
    }
