"""The quantiles have the digits of the tables, and the intervals cover what they should."""

from __future__ import annotations

import math
import random
import statistics

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from engine.intervals import (
    Interval,
    PairCounts,
    normal_quantile,
    paired_proportions,
    student_t,
    student_t_quantile,
    wilson,
)

Z_95 = 1.959963984540054

probabilities = st.floats(1e-9, 1 - 1e-9)
confidences = st.floats(0.5, 0.999)


@st.composite
def pair_counts(draw: st.DrawFn) -> PairCounts:
    cell = st.integers(0, 500)
    counts = PairCounts(draw(cell), draw(cell), draw(cell), draw(cell))
    assume(sum(counts))
    return counts


# --- quantiles --------------------------------------------------------------


def test_the_normal_quantile_is_that_of_the_tables() -> None:
    assert normal_quantile(0.975) == pytest.approx(Z_95, rel=1e-14)
    assert normal_quantile(0.5) == 0.0


@pytest.mark.parametrize(
    ("p", "dof", "quantile"),
    [
        # NIST/SEMATECH e-Handbook of Statistical Methods, table 1.3.6.7.2.
        (0.90, 4, 1.533),
        (0.95, 9, 1.833),
        (0.975, 3, 3.182),
        (0.975, 10, 2.228),
        (0.975, 30, 2.042),
        (0.99, 18, 2.552),
        (0.995, 60, 2.660),
        (0.999, 100, 3.174),
        (0.975, 1e15, 1.960),
    ],
)
def test_the_t_quantile_is_that_of_the_tables(p: float, dof: float, quantile: float) -> None:
    assert student_t_quantile(p, dof) == pytest.approx(quantile, abs=5.1e-4)


@given(probabilities)
def test_one_degree_of_freedom_is_the_cauchy_distribution(p: float) -> None:
    expected = math.tan(math.pi * (p - 0.5))
    assert student_t_quantile(p, 1) == pytest.approx(expected, rel=1e-6, abs=1e-9)


@given(probabilities)
def test_two_degrees_of_freedom_have_a_closed_form(p: float) -> None:
    expected = (2 * p - 1) / math.sqrt(2 * p * (1 - p))
    assert student_t_quantile(p, 2) == pytest.approx(expected, rel=1e-6, abs=1e-9)


@given(probabilities, st.floats(0.5, 1e6))
def test_the_t_quantile_is_odd_about_one_half(p: float, dof: float) -> None:
    mirrored = -student_t_quantile(1 - p, dof)
    assert student_t_quantile(p, dof) == pytest.approx(mirrored, rel=1e-6, abs=1e-9)


@given(st.floats(0.501, 1 - 1e-6), st.floats(0.5, 1e5), st.floats(1.01, 10))
def test_more_degrees_of_freedom_bring_it_nearer_to_the_normal(
    p: float, dof: float, factor: float
) -> None:
    near, far = student_t_quantile(p, dof * factor), student_t_quantile(p, dof)
    assert normal_quantile(p) < near < far


@pytest.mark.parametrize("p", [0.6, 0.975, 1 - 1e-9])
def test_both_ways_to_compute_it_meet(p: float) -> None:
    below, above = student_t_quantile(p, 1000), student_t_quantile(p, 1000.000001)
    assert above == pytest.approx(below, rel=1e-8)
    assert above != below


@pytest.mark.parametrize("p", [0.0, 1.0, -0.1, 1.1, math.nan])
def test_a_probability_is_between_0_and_1(p: float) -> None:
    with pytest.raises(ValueError, match="above 0 and below 1"):
        student_t_quantile(p, 5)
    with pytest.raises(ValueError, match="above 0 and below 1"):
        normal_quantile(p)


@pytest.mark.parametrize("dof", [0.0, -1.0, math.nan])
def test_degrees_of_freedom_are_above_0(dof: float) -> None:
    with pytest.raises(ValueError, match="degrees of freedom"):
        student_t_quantile(0.9, dof)


# --- proportions ------------------------------------------------------------


@pytest.mark.parametrize(
    ("successes", "n", "interval"),
    [
        # Newcombe, Statistics in Medicine 17, 1998, pages 857-872, table I, method 3.
        (81, 263, (0.2553, 0.3662)),
        (15, 148, (0.0624, 0.1605)),
        (0, 20, (0.0000, 0.1611)),
        (1, 29, (0.0061, 0.1718)),
    ],
)
def test_wilson_is_as_published(successes: int, n: int, interval: tuple[float, float]) -> None:
    assert wilson(successes, n) == pytest.approx(interval, abs=5.1e-5)


@given(st.integers(0, 2000), st.integers(0, 2000), confidences)
def test_wilson_holds_the_proportion_and_is_a_part_of_0_to_1(
    successes: int, failures: int, confidence: float
) -> None:
    n = successes + failures
    low, high = wilson(successes, n, confidence)
    assert 0 <= low < high <= 1
    if n:
        assert low <= successes / n <= high


def test_without_a_trial_any_proportion_is_possible() -> None:
    assert wilson(0, 0) == Interval(0.0, 1.0)


@pytest.mark.parametrize(("successes", "n"), [(-1, 5), (6, 5)])
def test_impossible_counts_are_refused(successes: int, n: int) -> None:
    with pytest.raises(ValueError, match="successes must be 0 to 5"):
        wilson(successes, n)


# --- pairs ------------------------------------------------------------------


def test_paired_proportions_are_as_published() -> None:
    """Airway hyper-responsiveness before and after a transplant: Fagerland, Lydersen and Laake,
    Statistics in Medicine 33, 2014, pages 2850-2875, by Newcombe's method."""
    interval = paired_proportions(PairCounts(both=1, only_first=1, only_second=7, neither=12))
    assert interval == pytest.approx((0.026, 0.507), abs=5.1e-4)
    assert interval.leaves_out(0.0)


@given(pair_counts(), confidences)
def test_the_interval_of_a_difference_holds_it(counts: PairCounts, confidence: float) -> None:
    difference = (counts.only_second - counts.only_first) / sum(counts)
    low, high = paired_proportions(counts, confidence)
    assert -1 <= low <= difference + 1e-12
    assert difference - 1e-12 <= high <= 1


@given(pair_counts())
def test_subjects_that_change_places_change_the_sign(counts: PairCounts) -> None:
    both, only_first, only_second, neither = counts
    low, high = paired_proportions(counts)
    swapped = paired_proportions(PairCounts(both, only_second, only_first, neither))
    assert swapped == pytest.approx((-high, -low), abs=1e-12)


@given(st.integers(0, 500), st.integers(0, 500))
def test_equal_answers_show_no_difference(both: int, neither: int) -> None:
    assert not paired_proportions(PairCounts(both, 0, 0, neither)).leaves_out(0.0)


def test_without_a_pair_any_difference_is_possible() -> None:
    assert paired_proportions(PairCounts(0, 0, 0, 0)) == Interval(-1.0, 1.0)


def test_the_pairs_count_and_not_the_rates_alone() -> None:
    """60 of 100 against 70 of 100, once with ten changes and once with fifty."""
    few = paired_proportions(PairCounts(60, 0, 10, 30))
    many = paired_proportions(PairCounts(40, 20, 30, 10))
    assert few.leaves_out(0.0)
    assert not many.leaves_out(0.0)


def test_paired_proportions_cover_as_often_as_they_say() -> None:
    draw = random.Random(5)
    weights, truth, covered, rounds = (0.5, 0.1, 0.2, 0.2), 0.1, 0, 2000
    for _ in range(rounds):
        drawn = draw.choices(range(4), weights, k=60)
        interval = paired_proportions(PairCounts(*(drawn.count(cell) for cell in range(4))))
        covered += not interval.leaves_out(truth)
    assert 0.94 <= covered / rounds <= 0.98


# --- means ------------------------------------------------------------------


def test_the_interval_of_a_mean_is_students() -> None:
    """Student's own data: hours of sleep gained with hyoscyamine, ten patients, both drugs."""
    first = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
    second = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]
    gains = [b - a for a, b in zip(first, second, strict=True)]
    interval = student_t(statistics.fmean(gains), statistics.stdev(gains), len(gains))
    assert interval == pytest.approx((0.7001142, 2.4598858), abs=1e-6)  # R: t.test(paired=TRUE)


@pytest.mark.parametrize("n", [0, 1])
def test_one_value_says_nothing_of_its_spread(n: int) -> None:
    interval = student_t(0.3, 0.0, n)
    assert interval == Interval(-math.inf, math.inf)
    assert not interval.leaves_out(0.0)


def test_the_ends_belong_to_an_interval() -> None:
    interval = Interval(0.0, 0.5)
    assert not interval.leaves_out(0.0)
    assert not interval.leaves_out(0.5)
    assert interval.leaves_out(-1e-9)
    assert interval.leaves_out(0.6)
