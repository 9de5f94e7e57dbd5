"""How the busiest adapters and their arms do, for the status page."""

from __future__ import annotations

import time
from collections.abc import Sequence

from engine.pool import ServedAdapter
from engine.ring import AdapterKey
from gateway.arms import Outcome
from gateway.comparison import SERVER_ERRORS
from gateway.sights import Sights
from gateway.status import AdapterStatus, ArmStatus
from store.records import Arm, Guard

ADAPTERS_SHOWN = 20
ARMS_SHOWN = 8
WINDOW_S = 60.0
OUTCOMES_READ = 250
"""Of each arm, the newest: enough for its percentiles, and what 160 arms cost the event loop once a
second (20 ms on a slow processor) nobody notices."""


def read_adapters(sights: Sights, tenant: str) -> list[AdapterStatus]:
    """The busiest adapters of the last minute; among equals, those whose traffic is split first."""
    served = sights.ledger.view.tenants.get(tenant, {})
    rates = sights.throughput.by_adapter()

    def rank(name: str) -> tuple[float, int, str]:
        rate = rates.get(AdapterKey(tenant, name), 0.0)
        return -rate, -len(served[name].split.arms), name

    return [
        _status(sights, tenant, name, served[name], rates.get(AdapterKey(tenant, name), 0.0))
        for name in sorted(served, key=rank)[:ADAPTERS_SHOWN]
    ]


def _status(
    sights: Sights, tenant: str, name: str, served: ServedAdapter, rate: float
) -> AdapterStatus:
    record = sights.ledger.guarded.get((tenant, name))
    guard = None if record is None else record.guard
    total = sum(arm.weight for arm in served.split.arms)
    arms = sorted(served.split.arms, key=lambda arm: (-arm.weight, arm.version))[:ARMS_SHOWN]
    homes: Sequence[str] = ()
    if sights.shards is not None:
        homes = sights.shards.pool.ring.replicas(AdapterKey(tenant, name))
    return AdapterStatus(
        name=name,
        ready=len(served.ready),
        shards=homes,
        tokens_per_s=rate,
        arms=[_arm(sights, tenant, name, arm, total, guard) for arm in arms],
    )


def _arm(
    sights: Sights, tenant: str, adapter: str, arm: Arm, total: int, guard: Guard | None
) -> ArmStatus:
    now_s = time.time()
    outcomes = sights.arms.newest(
        tenant, adapter, arm.version, since_s=now_s - WINDOW_S, limit=OUTCOMES_READ
    )
    cut = len(outcomes) == OUTCOMES_READ
    span_s = max(1.0, now_s - outcomes[-1].end_s) if cut else WINDOW_S
    waits_s = sorted(outcome.ttft_s for outcome in outcomes if outcome.ttft_s is not None)
    return ArmStatus(
        version=arm.version,
        share=arm.weight / total,
        guard=_words(guard) if guard is not None and guard.version == arm.version else "",
        requests=len(outcomes),
        requests_per_s=round(len(outcomes) / span_s, 3),
        tokens_per_s=round(sum(outcome.completion_tokens for outcome in outcomes) / span_s, 2),
        error_ratio=_error_ratio(outcomes),
        ttft_p50_ms=_percentile_ms(waits_s, 50),
        ttft_p95_ms=_percentile_ms(waits_s, 95),
    )


def _error_ratio(outcomes: Sequence[Outcome]) -> float | None:
    if not outcomes:
        return None
    return sum(outcome.code in SERVER_ERRORS for outcome in outcomes) / len(outcomes)


def _percentile_ms(ordered_s: Sequence[float], percent: int) -> float | None:
    """By nearest rank; None of nothing."""
    if not ordered_s:
        return None
    return ordered_s[-(-len(ordered_s) * percent // 100) - 1] * 1000


def _words(guard: Guard) -> str:
    """The limits of a guard."""
    limits = []
    if guard.max_error_ratio is not None:
        limits.append(f"errors above {guard.max_error_ratio:.4g}")
    if guard.max_ttft_p95_ms is not None:
        limits.append(f"ttft p95 above {guard.max_ttft_p95_ms:.6g} ms")
    if guard.max_total_p95_ms is not None:
        limits.append(f"total p95 above {guard.max_total_p95_ms:.6g} ms")
    return f"{' or '.join(limits)}, from {guard.min_requests} requests on"
