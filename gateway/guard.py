"""The guard's judgement: whether one version does so badly that its split must be rolled back.

Requests without an answer tell something of latency too. A version that hangs would have no
latencies at all otherwise, and no errors of the server either where callers give up by deadlines
of their own. So a request without a first token, or without a good end, counts as over a limit
once it has lasted longer than that; one that ended sooner says nothing, and is left out.
"""

from __future__ import annotations

from collections.abc import Sequence

from gateway.arms import OK, Outcome
from gateway.comparison import SERVER_ERRORS
from store.records import Guard

_PERCENT = 95


def breach(guard: Guard, outcomes: Sequence[Outcome]) -> str | None:
    """Which limits are breached, in words with figures; None if none is.

    `outcomes` are those of the guarded version since the split was set. Nothing is judged below
    `guard.min_requests` of them, and no latency below as many that count for it. Who equals a
    limit keeps it. The 95th percentile is that by nearest rank: it is over its limit if and only
    if more than 5 % of the requests are, so one slow request is never enough among 20.
    """
    if not outcomes or len(outcomes) < guard.min_requests:
        return None
    breaches = []
    if guard.max_error_ratio is not None:
        breaches.append(_errors(outcomes, guard.max_error_ratio))
    if (limit_ms := guard.max_ttft_p95_ms) is not None:
        waits_ms = _ttfts_ms(outcomes, limit_ms)
        breaches.append(_slowness("ttft", waits_ms, limit_ms, guard.min_requests))
    if (limit_ms := guard.max_total_p95_ms) is not None:
        totals_ms = _totals_ms(outcomes, limit_ms)
        breaches.append(_slowness("total", totals_ms, limit_ms, guard.min_requests))
    return "; ".join(filter(None, breaches)) or None


def _errors(outcomes: Sequence[Outcome], limit: float) -> str | None:
    ratio = sum(outcome.code in SERVER_ERRORS for outcome in outcomes) / len(outcomes)
    if ratio <= limit:
        return None
    return f"error ratio {ratio:.4g} of {len(outcomes)} requests is over {limit:.6g}"


def _slowness(
    measure: str, values_ms: Sequence[float], limit_ms: float, min_requests: int
) -> str | None:
    count = len(values_ms)
    over = sum(value_ms > limit_ms for value_ms in values_ms)
    # In whole numbers, because 0.95 times a count may be a little off.
    if count < min_requests or over * 100 <= count * (100 - _PERCENT):
        return None
    rank = -(-count * _PERCENT // 100)
    p95_ms = sorted(values_ms)[rank - 1]
    return f"p95 of {measure} {p95_ms:.2f} ms of {count} requests is over {limit_ms:.2f} ms"


def _ttfts_ms(outcomes: Sequence[Outcome], limit_ms: float) -> list[float]:
    """Times to first token; without one, how long it was waited for if that is over the limit."""
    known = [outcome.ttft_s * 1000 for outcome in outcomes if outcome.ttft_s is not None]
    waited = [outcome.total_s * 1000 for outcome in outcomes if outcome.ttft_s is None]
    return known + [wait_ms for wait_ms in waited if wait_ms > limit_ms]


def _totals_ms(outcomes: Sequence[Outcome], limit_ms: float) -> list[float]:
    """Times of what ended OK; of the others, how long they lasted if that is over the limit."""
    known = [outcome.total_s * 1000 for outcome in outcomes if outcome.code == OK]
    lasted = [outcome.total_s * 1000 for outcome in outcomes if outcome.code != OK]
    return known + [total_ms for total_ms in lasted if total_ms > limit_ms]
