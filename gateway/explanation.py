"""Where one process would send a request, and by what; nothing is sent."""

from __future__ import annotations

import os
from dataclasses import dataclass

from engine.errors import AdapterNotFound, AdapterNotReady
from engine.pool import ShardPool
from engine.ring import Choice, NoShardOpen
from gateway.messages import Explain


@dataclass(frozen=True, slots=True)
class Explanation:
    """What one process decides for a request, with all that decided it."""

    process_id: int
    version: int
    """0 is the base model."""
    choice: Choice | None
    """None: no shard is open."""
    plan_revision: int


def explain(pool: ShardPool, request: Explain) -> Explanation | None:
    """The decision of this process now; None if it knows no such version."""
    try:
        key = pool.resolve(request.tenant, request.adapter, request.version, request.session)
    except (AdapterNotFound, AdapterNotReady):
        return None
    try:
        choice = pool.choose(key)
    except NoShardOpen:
        choice = None
    version = 0 if key is None else key.version
    return Explanation(os.getpid(), version, choice, pool.ring.plan.revision)
