"""A comparison counts what it should, and its intervals hold what they say."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import grpc
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.arms import Outcome
from gateway.comparison import (
    SERVER_ERRORS,
    ArmDifference,
    Comparison,
    Measure,
    Quantiles,
    compare,
)
from store.records import FeedbackSummary
from tests.gateway.outcomes import failure, outcome

PROTO = Path(__file__).parents[2] / "proto" / "lora_gateway" / "v1" / "adapters.proto"

NOTHING = Quantiles(0, 0.0, 0.0, 0.0, 0.0, 0.0)
Z_95 = 1.6448536269514722


def differences(
    baseline: Sequence[Outcome], arm: Sequence[Outcome], confidence: float = 0.95
) -> dict[Measure, ArmDifference]:
    """By measure, between version 1 and version 2."""
    found = compare({1: baseline, 2: arm}, {}, confidence).differences
    return {difference.measure: difference for difference in found}


def mixed(errors: int, count: int) -> list[Outcome]:
    return [failure()] * errors + [outcome()] * (count - errors)


def waits(*ttfts_ms: float) -> list[Outcome]:
    """Requests that were cancelled after their first token."""
    return [outcome(code="CANCELLED", ttft_s=ttft_ms / 1000) for ttft_ms in ttfts_ms]


def error_ratio(errors: int, of: int, base_errors: int, base_of: int) -> ArmDifference:
    return differences(mixed(base_errors, base_of), mixed(errors, of))[Measure.ERROR_RATIO]


# --- reports ----------------------------------------------------------------


def test_an_arm_is_reported_by_the_requests_that_have_each_measure() -> None:
    requests = [
        outcome(ttft_s=0.1, total_s=1.0, inter_token_s=0.01, completion_tokens=100),
        outcome(ttft_s=0.3, total_s=2.0, inter_token_s=None, completion_tokens=1),
        outcome(code="CANCELLED", ttft_s=0.2, total_s=60.0, completion_tokens=7, finish_reasons=()),
        failure(total_s=90.0, prompt_tokens=0),
    ]
    scores = FeedbackSummary(3, 0.5, 0.1)
    (report,) = compare({4: requests}, {4: scores, 5: FeedbackSummary(1, 1.0, 0.0)}, 0.95).arms
    assert (report.version, report.request_count, report.feedback) == (4, 4, scores)
    assert report.codes == {"OK": 2, "CANCELLED": 1, "INTERNAL": 1}
    assert report.finish_reasons == {"stop": 2}
    assert (report.prompt_tokens_total, report.completion_tokens_total) == (30, 108)
    assert (report.ttft_ms.count, report.inter_token_ms.count, report.total_ms.count) == (3, 2, 2)
    assert report.ttft_ms.p50 == pytest.approx(200.0)
    assert report.inter_token_ms.mean == pytest.approx(30.0)
    assert report.total_ms.mean == pytest.approx(1500.0)
    assert (report.completion_tokens.count, report.completion_tokens.mean) == (2, 50.5)


def test_each_completion_has_its_finish_reason() -> None:
    requests = [outcome(finish_reasons=("stop", "length", "stop")), outcome()]
    (report,) = compare({1: requests}, {}, 0.95).arms
    assert report.finish_reasons == {"stop": 3, "length": 1}


def test_quantiles_are_those_of_all_values() -> None:
    (report,) = compare({1: waits(*range(100, -1, -1))}, {}, 0.95).arms
    expected = [101, 50.0, 50.0, 90.0, 95.0, 99.0]
    found = report.ttft_ms
    assert [found.count, found.mean, found.p50, found.p90, found.p95, found.p99] == pytest.approx(
        expected
    )


def test_a_version_without_requests_has_an_empty_report() -> None:
    found = compare({1: [], 2: [outcome()] * 100}, {}, 0.95)
    report = found.arms[0]
    assert (report.request_count, report.codes, report.finish_reasons) == (0, {}, {})
    assert report.ttft_ms == report.total_ms == report.completion_tokens == NOTHING
    assert report.feedback == FeedbackSummary(0, 0.0, 0.0)
    assert found.differences == ()


def test_no_arms_compare_to_nothing() -> None:
    assert compare({}, {}, 0.95) == Comparison((), ())


def test_arms_stay_in_order_and_differ_from_the_first() -> None:
    found = compare({7: mixed(0, 9), 3: mixed(3, 9), 5: mixed(9, 9)}, {}, 0.95)
    assert [arm.version for arm in found.arms] == [7, 3, 5]
    ratios = {d.version: d.difference for d in found.differences if d.measure == "error_ratio"}
    assert ratios == {3: pytest.approx(1 / 3), 5: 1.0}


# --- which differences there are --------------------------------------------


def test_measures_are_those_of_the_contract_in_its_order() -> None:
    text = re.search(r"// measure that differs:(.*?)string measure", PROTO.read_text(), re.DOTALL)
    assert text is not None
    enough = [outcome(ttft_s=n / 10, inter_token_s=n / 100, total_s=n) for n in range(100)]
    scores = FeedbackSummary(5, 0.5, 0.1)
    found = compare({1: enough, 2: enough}, {1: scores, 2: scores}, 0.95).differences
    names = [str(difference.measure) for difference in found]
    assert names == re.findall(r"`([^`]+)`", text[1]) == list(Measure)


@pytest.mark.parametrize(
    ("count", "measure"),
    [(2, Measure.ERROR_RATIO), (6, Measure.TTFT_P50), (59, Measure.TTFT_P95)],
)
def test_too_few_values_leave_a_measure_out(count: int, measure: Measure) -> None:
    enough, many = waits(*range(count)), waits(*range(1_000))
    assert measure in differences(many, enough)
    assert measure in differences(enough, many)
    assert measure not in differences(many, enough[1:])
    assert measure not in differences(enough[1:], many)


def test_a_higher_confidence_needs_more_values() -> None:
    requests = waits(*range(6))
    assert Measure.TTFT_P50 not in differences(requests, requests, confidence=0.99)


def test_means_need_two_values() -> None:
    assert Measure.COMPLETION_TOKENS_MEAN in differences([outcome()] * 2, [outcome()] * 2)
    lone = [outcome(), failure(), failure()]
    assert Measure.COMPLETION_TOKENS_MEAN not in differences([outcome()] * 2, lone)
    one, two = FeedbackSummary(1, 0.5, 0.0), FeedbackSummary(2, 0.5, 0.1)
    assert not compare({1: [], 2: []}, {1: one, 2: two}, 0.95).differences
    assert not compare({1: [], 2: []}, {2: two}, 0.95).differences
    assert len(compare({1: [], 2: []}, {1: two, 2: two}, 0.95).differences) == 1


def test_scores_too_large_to_subtract_are_left_out() -> None:
    feedback = {1: FeedbackSummary(2, -1.7e308, 1e300), 2: FeedbackSummary(2, 1.7e308, 1e300)}
    assert not compare({1: [], 2: []}, feedback, 0.95).differences


@pytest.mark.parametrize("confidence", [0.0, 1.0, -0.5, 95.0, math.nan])
def test_a_confidence_that_is_none_is_refused(confidence: float) -> None:
    with pytest.raises(ValueError, match="above 0 and below 1"):
        compare({1: []}, {}, confidence)


# --- known answers ----------------------------------------------------------


def test_errors_are_those_of_the_server_alone() -> None:
    codes = [code.name for code in grpc.StatusCode]
    assert SERVER_ERRORS.issubset(codes)
    difference = differences([outcome()] * 2, [outcome(code=code) for code in codes])
    assert difference[Measure.ERROR_RATIO].difference == 5 / len(codes)
    assert not SERVER_ERRORS & {"OK", "CANCELLED", "INVALID_ARGUMENT", "NOT_FOUND"}


@pytest.mark.parametrize(
    ("errors", "of", "base_errors", "base_of", "low", "high"),
    [
        # Newcombe 1998, table II, method 10.
        (56, 70, 48, 80, 0.0524, 0.3339),
        (9, 10, 3, 10, 0.1705, 0.8090),
        (6, 7, 2, 7, 0.0582, 0.8062),
        (5, 56, 0, 29, -0.0381, 0.1926),
        (0, 10, 0, 20, -0.1611, 0.2775),
        (0, 10, 0, 10, -0.2775, 0.2775),
        (10, 10, 0, 20, 0.6791, 1.0000),
        (10, 10, 0, 10, 0.6075, 1.0000),
    ],
)
def test_error_ratios_differ_as_newcombe_has_it(
    errors: int, of: int, base_errors: int, base_of: int, low: float, high: float
) -> None:
    found = error_ratio(errors, of, base_errors, base_of)
    assert found.low == pytest.approx(low, abs=5.1e-5)
    assert found.high == pytest.approx(high, abs=5.1e-5)
    assert found.significant == (low > 0)


@given(st.integers(0, 60), st.integers(2, 60), st.integers(0, 60), st.integers(2, 60))
def test_an_interval_of_ratios_holds_their_difference(a: int, m: int, b: int, n: int) -> None:
    a, b = min(a, m), min(b, n)
    found, mirrored = error_ratio(a, m, b, n), error_ratio(b, n, a, m)
    assert -1 - 1e-12 <= found.low <= found.difference <= found.high <= 1 + 1e-12
    assert (found.low, found.high) == pytest.approx((-mirrored.high, -mirrored.low))


def test_means_differ_as_welch_has_it() -> None:
    # 15 values each with these means and variances: 24.99 degrees of freedom, so the tables'
    # 2.060 for 25 (NIST/SEMATECH e-Handbook, 1.3.6.7.2) times 0.8832, the standard error.
    base, arm = FeedbackSummary(15, 20.8, math.sqrt(7.9)), FeedbackSummary(15, 23.0, math.sqrt(3.8))
    (found,) = compare({1: [], 2: []}, {1: base, 2: arm}, 0.95).differences
    assert found.measure is Measure.FEEDBACK_MEAN
    assert found.difference == pytest.approx(2.2)
    assert (found.low, found.high) == pytest.approx((2.2 - 1.8194, 2.2 + 1.8194), abs=1e-3)
    assert found.significant


def test_tokens_are_compared_as_scores_are() -> None:
    tokens, base_tokens = [8, 12, 13, 20], [3, 9, 10]
    mean = differences(
        [outcome(completion_tokens=count) for count in base_tokens],
        [outcome(completion_tokens=count) for count in tokens],
    )[Measure.COMPLETION_TOKENS_MEAN]
    scores = {
        version: FeedbackSummary(len(values), float(np.mean(values)), float(np.std(values, ddof=1)))
        for version, values in ((1, base_tokens), (2, tokens))
    }
    (expected,) = compare({1: [], 2: []}, scores, 0.95).differences
    assert (mean.difference, mean.low, mean.high) == pytest.approx(
        (expected.difference, expected.low, expected.high)
    )


def test_means_without_spread_differ_for_sure() -> None:
    base, arm = FeedbackSummary(9, 1.0, 0.0), FeedbackSummary(9, 3.0, 0.0)
    (found,) = compare({1: [], 2: []}, {1: base, 2: arm}, 0.95).differences
    assert (found.low, found.difference, found.high, found.significant) == (2.0, 2.0, 2.0, True)


@pytest.mark.parametrize(("p", "measure"), [(0.5, Measure.TTFT_P50), (0.95, Measure.TTFT_P95)])
@pytest.mark.parametrize("sizes", [(60, 90), (300, 61)])
def test_quantiles_differ_as_whole_resamples_do(
    p: float, measure: Measure, sizes: tuple[int, int]
) -> None:
    random = np.random.default_rng(7)
    base, arm = (random.lognormal(5.0, 0.7, size) for size in sizes)
    found = differences(waits(*base), waits(*arm))[measure]
    draws, base_draws = (
        np.quantile(random.choice(values, (20_000, values.size)), p, axis=1)
        for values in (arm, base)
    )
    assert found.difference == pytest.approx(np.quantile(arm, p) - np.quantile(base, p))
    below, above = np.mean(draws - base_draws < found.low), np.mean(draws - base_draws > found.high)
    # Each end is at 0.025, give or take what 4,000 and 20,000 draws leave to chance (3.5 sigma).
    assert abs(below - 0.025) < 0.0095
    assert abs(above - 0.025) < 0.0095


@pytest.mark.parametrize(("confidence", "ends_ms"), [(0.2, (50, 50)), (0.4, (0, 100))])
def test_a_median_of_a_resample_may_be_between_two_values(
    confidence: float, ends_ms: tuple[float, float]
) -> None:
    """The median of six of which each is 0 or 100 is 50 in 20 of 64 cases, else either."""
    halves = waits(0, 0, 0, 100, 100, 100)
    found = differences(waits(*[0] * 6), halves, confidence)[Measure.TTFT_P50]
    assert (found.low, found.high) == ends_ms


def test_the_same_requests_get_the_same_intervals() -> None:
    requests, others = waits(*range(100)), waits(*range(30, 150))
    assert differences(requests, others) == differences(requests, others)


# --- coverage ---------------------------------------------------------------

RUNS = 400
SIZE = 120


def drawn(slow: bool, random: np.random.Generator) -> tuple[list[Outcome], FeedbackSummary]:
    """Requests and scores of one arm, whose true differences are in TRUTH."""
    spread = 0.6 if slow else 0.4
    mean_s = 1.3 if slow else 1.0
    requests = [
        (failure if failed else outcome)(
            ttft_s=ttft_s, inter_token_s=inter_token_s, total_s=total_s, completion_tokens=tokens
        )
        for failed, ttft_s, inter_token_s, total_s, tokens in zip(
            random.random(SIZE) < (0.2 if slow else 0.1),
            random.lognormal(0.0, spread, SIZE),
            random.exponential(mean_s, SIZE),
            random.uniform(0.0, mean_s, SIZE),
            random.integers(1, 140 if slow else 100, SIZE).tolist(),
            strict=True,
        )
    ]
    scores = (random.random(SIZE) < (0.7 if slow else 0.6)).astype(float)
    return requests, FeedbackSummary(SIZE, float(scores.mean()), float(scores.std(ddof=1)))


TRUTH = {
    Measure.ERROR_RATIO: 0.1,
    Measure.TTFT_P50: 0.0,
    Measure.TTFT_P95: 1000 * (math.exp(0.6 * Z_95) - math.exp(0.4 * Z_95)),
    Measure.INTER_TOKEN_P50: 300 * math.log(2),
    Measure.INTER_TOKEN_P95: 300 * math.log(20),
    Measure.TOTAL_P50: 150.0,
    Measure.TOTAL_P95: 285.0,
    Measure.COMPLETION_TOKENS_MEAN: 20.0,
    Measure.FEEDBACK_MEAN: 0.1,
}


@pytest.fixture(scope="module")
def hits() -> Counter[Measure]:
    """In how many runs each interval held the truth."""
    found: Counter[Measure] = Counter()
    for seed in range(RUNS):
        random = np.random.default_rng(seed)
        (base, base_scores), (arm, scores) = (drawn(slow, random) for slow in (False, True))
        result = compare({1: base, 2: arm}, {1: base_scores, 2: scores}, 0.95)
        assert len(result.differences) == len(TRUTH)
        found.update(d.measure for d in result.differences if d.low <= TRUTH[d.measure] <= d.high)
    return found


@pytest.mark.parametrize("measure", list(Measure))
def test_intervals_hold_the_truth_as_often_as_they_say(
    hits: Counter[Measure], measure: Measure
) -> None:
    assert 0.92 <= hits[measure] / RUNS <= 0.98
