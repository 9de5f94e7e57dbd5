"""The guard acts on what is over its limits, and on nothing else."""

from __future__ import annotations

import math
from collections.abc import Sequence

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.arms import Outcome
from gateway.comparison import SERVER_ERRORS
from gateway.guard import breach
from store.records import Guard
from tests.gateway.outcomes import failure, outcome

LIMIT_MS = 500.0

seconds = st.floats(0.0, 2.0)
codes = st.sampled_from([code.name for code in grpc.StatusCode])
requests = st.lists(
    st.builds(
        lambda code, ttft_s, total_s: outcome(code=code, ttft_s=ttft_s, total_s=total_s),
        codes,
        st.none() | seconds,
        seconds,
    ),
    max_size=60,
)
ratios = st.none() | st.floats(0.0, 1.0)
limits_ms = st.none() | st.floats(1.0, 2_500.0)
guards = st.builds(Guard, st.just(1), st.integers(1, 40), ratios, limits_ms, limits_ms)


def guard(min_requests: int = 20, **limits: float) -> Guard:
    return Guard(1, min_requests, **limits)


def mixed(errors: int, count: int) -> list[Outcome]:
    return [failure()] * errors + [outcome()] * (count - errors)


def over(values_ms: Sequence[float], limit_ms: float, min_requests: int) -> bool:
    """Whether fewer than 95 of 100 values are within the limit."""
    within = sum(value_ms <= limit_ms for value_ms in values_ms)
    return len(values_ms) >= min_requests and within * 100 < 95 * len(values_ms)


# --- errors -----------------------------------------------------------------


def test_too_many_errors_are_a_breach_with_figures() -> None:
    reason = breach(guard(max_error_ratio=0.05), mixed(14, 45))
    assert reason == "error ratio 0.3111 of 45 requests is over 0.05"


def test_a_ratio_at_the_limit_is_kept() -> None:
    assert breach(guard(max_error_ratio=0.05), mixed(1, 20)) is None
    assert breach(guard(max_error_ratio=0.05), mixed(2, 20)) is not None


def test_a_limit_of_nothing_breaks_with_the_first_error() -> None:
    assert breach(guard(max_error_ratio=0.0), mixed(0, 20)) is None
    assert breach(guard(max_error_ratio=0.0), mixed(1, 20)) is not None


@pytest.mark.parametrize("code", [code.name for code in grpc.StatusCode])
def test_only_errors_of_the_server_count(code: str) -> None:
    reason = breach(guard(max_error_ratio=0.5), [failure(code=code)] * 20)
    assert (reason is not None) == (code in SERVER_ERRORS)


# --- latencies --------------------------------------------------------------


@pytest.mark.parametrize("slow", [0, 1, 2])
def test_one_slow_request_of_twenty_is_no_breach(slow: int) -> None:
    waits = [outcome(ttft_s=9.0)] * slow + [outcome(ttft_s=0.5)] * (20 - slow)
    reason = breach(guard(max_ttft_p95_ms=LIMIT_MS), waits)
    expected = "p95 of ttft 9000.00 ms of 20 requests is over 500.00 ms"
    assert reason == (expected if slow == 2 else None)


def test_five_of_a_hundred_may_be_slow() -> None:
    waits = [outcome(ttft_s=9.0)] * 5 + [outcome(ttft_s=0.1)] * 95
    assert breach(guard(max_ttft_p95_ms=LIMIT_MS), waits) is None
    assert breach(guard(max_ttft_p95_ms=LIMIT_MS), [outcome(ttft_s=9.0), *waits[:-1]]) is not None


def test_totals_are_those_of_what_ended_ok() -> None:
    limits = guard(max_total_p95_ms=LIMIT_MS)
    assert breach(limits, [outcome(total_s=0.6)] * 20) == (
        "p95 of total 600.00 ms of 20 requests is over 500.00 ms"
    )
    quick = [failure(total_s=0.001)] * 100
    assert breach(limits, [outcome(total_s=0.6)] * 20 + quick) is not None, (
        "errors that come quickly make nothing faster"
    )


@pytest.mark.parametrize("code", ["CANCELLED", "DEADLINE_EXCEEDED"])
def test_a_version_that_hangs_is_a_breach_of_either_latency(code: str) -> None:
    hanging = [failure(code=code, total_s=30.0)] * 20
    assert breach(guard(max_ttft_p95_ms=LIMIT_MS), hanging) is not None
    assert breach(guard(max_total_p95_ms=LIMIT_MS), hanging) is not None


def test_what_ended_before_the_limit_says_nothing_of_latency() -> None:
    brief = [failure(code="CANCELLED", total_s=0.4)] * 1_000
    slow = [outcome(ttft_s=0.6, total_s=0.7)] * 20
    assert breach(guard(max_ttft_p95_ms=LIMIT_MS), [*brief, *slow]) is not None
    assert breach(guard(max_ttft_p95_ms=LIMIT_MS), [*brief, *slow[1:]]) is None, (
        "with 19 that count nothing is judged"
    )


# --- all together -----------------------------------------------------------


def test_every_breach_is_named() -> None:
    limits = guard(max_error_ratio=0.1, max_ttft_p95_ms=LIMIT_MS, max_total_p95_ms=LIMIT_MS)
    slow = [outcome(ttft_s=1.0, total_s=2.0)] * 20
    reason = breach(limits, [*slow, *mixed(20, 20)])
    assert reason == (
        "error ratio 0.5 of 40 requests is over 0.1; "
        "p95 of ttft 1000.00 ms of 20 requests is over 500.00 ms; "
        "p95 of total 2000.00 ms of 20 requests is over 500.00 ms"
    )


@given(guards, requests)
def test_a_guard_acts_if_and_only_if_a_limit_is_breached(
    limits: Guard, outcomes: list[Outcome]
) -> None:
    errors = sum(each.code in SERVER_ERRORS for each in outcomes)
    ratio_limit, ttft_limit_ms, total_limit_ms = (
        math.inf if limit is None else limit
        for limit in (limits.max_error_ratio, limits.max_ttft_p95_ms, limits.max_total_p95_ms)
    )
    ttfts_ms = [
        1000 * (each.total_s if each.ttft_s is None else each.ttft_s)
        for each in outcomes
        if each.ttft_s is not None or each.total_s * 1000 > ttft_limit_ms
    ]
    totals_ms = [
        1000 * each.total_s
        for each in outcomes
        if each.code == "OK" or each.total_s * 1000 > total_limit_ms
    ]
    expected = len(outcomes) >= limits.min_requests and (
        errors / len(outcomes) > ratio_limit
        or over(ttfts_ms, ttft_limit_ms, limits.min_requests)
        or over(totals_ms, total_limit_ms, limits.min_requests)
    )
    assert (breach(limits, outcomes) is not None) == expected


@given(guards, requests)
def test_the_order_of_requests_does_not_matter(limits: Guard, outcomes: list[Outcome]) -> None:
    assert breach(limits, outcomes) == breach(limits, sorted(outcomes, key=lambda o: o.total_s))


@given(requests)
def test_a_guard_without_limits_never_acts(outcomes: list[Outcome]) -> None:
    assert breach(guard(min_requests=1), outcomes) is None


@given(guards, requests)
def test_nothing_is_judged_below_its_number(limits: Guard, outcomes: list[Outcome]) -> None:
    assert breach(limits, outcomes[: limits.min_requests - 1]) is None


@given(guards, requests)
def test_a_request_that_is_well_starts_no_breach_once_all_are_judged(
    limits: Guard, outcomes: list[Outcome]
) -> None:
    enough = [outcome(ttft_s=0.0, total_s=0.0)] * limits.min_requests
    judged = [*outcomes, *enough]
    if breach(limits, judged) is None:
        assert breach(limits, [*judged, outcome(ttft_s=0.0, total_s=0.0)]) is None
