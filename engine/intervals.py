"""Confidence intervals of means, of proportions, and of differences within pairs.

Small samples and proportions near 0 or 1 are the rule here, so no interval is the textbook
normal one: proportions get Wilson's score interval, pairs of them Newcombe's, means Student's.
Written out because the gateway does not depend on scipy.
"""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import NamedTuple

CONFIDENCE = 0.95
"""What an interval holds, unless a caller asks otherwise."""

_NORMAL = NormalDist()
_MANY_DOF = 1_000.0
"""From here on the expansion about the normal distribution has all digits that a double has."""
_RELATIVE_ERROR = 1e-14
_MAX_TERMS = 1_000
"""Of the continued fraction, which takes under 100 for the degrees of freedom that reach it."""


class Interval(NamedTuple):
    """A closed interval; ends are infinite where nothing is known."""

    low: float
    high: float

    def leaves_out(self, value: float) -> bool:
        """Whether `value` is outside."""
        return not self.low <= value <= self.high


class PairCounts(NamedTuple):
    """How often each of two subjects succeeded at the same tasks."""

    both: int
    only_first: int
    only_second: int
    neither: int


def normal_quantile(p: float) -> float:
    """The value below which a standard normal variable is with probability `p`.

    Raises ValueError unless 0 < p < 1.
    """
    _check_probability(p)
    return _NORMAL.inv_cdf(p)


def student_t_quantile(p: float, dof: float) -> float:
    """The value below which Student's t with `dof` degrees of freedom is with probability `p`.

    `dof` need not be whole, as in Welch's test. To 10 digits and more for `dof` of at least 1
    and `p` not within 1e-12 of 0 or 1. Raises ValueError unless 0 < p < 1 and dof > 0.
    """
    _check_probability(p)
    if not dof > 0:
        raise ValueError(f"degrees of freedom must be above 0, not {dof}")
    if p == 0.5:
        return 0.0
    if dof > _MANY_DOF:
        return _t_near_normal(_NORMAL.inv_cdf(p), dof)
    quantile = _t_of_upper_tail(min(p, 1 - p), dof)
    return quantile if p > 0.5 else -quantile


def wilson(successes: int, n: int, confidence: float = CONFIDENCE) -> Interval:
    """Interval of a proportion, of which `successes` of `n` trials were seen.

    Wilson's score interval without continuity correction (Wilson, JASA 22, 1927); all of [0, 1]
    without a trial. Raises ValueError for impossible counts.
    """
    if not 0 <= successes <= n:
        raise ValueError(f"successes must be 0 to {n}, not {successes}")
    z = _two_sided(confidence)
    if n == 0:
        return Interval(0.0, 1.0)
    share, square = successes / n, z * z
    center = (share + square / (2 * n)) / (1 + square / n)
    half = z / (1 + square / n) * math.sqrt(share * (1 - share) / n + square / (4 * n * n))
    # The ends are exact there, and rounding would leave the proportion itself outside.
    low = 0.0 if successes == 0 else center - half
    high = 1.0 if successes == n else center + half
    return Interval(low, high)


def paired_proportions(counts: PairCounts, confidence: float = CONFIDENCE) -> Interval:
    """Interval of the second success rate less the first, over the same tasks.

    Newcombe's method 10, which joins two Wilson intervals by their correlation (Statistics in
    Medicine 17, 1998, pages 2635-2650). [-1, 1] without a task.
    """
    n = sum(counts)
    if n == 0:
        return Interval(-1.0, 1.0)
    first, second = counts.both + counts.only_first, counts.both + counts.only_second
    below_1, above_1 = _distances(first, n, confidence)
    below_2, above_2 = _distances(second, n, confidence)
    correlation = _correlation(counts)
    difference = (counts.only_second - counts.only_first) / n
    return Interval(
        max(-1.0, difference - _joined(below_2, above_1, correlation)),
        min(1.0, difference + _joined(above_2, below_1, correlation)),
    )


def student_t(mean: float, deviation: float, n: int, confidence: float = CONFIDENCE) -> Interval:
    """Interval of a mean, from the mean and the sample standard deviation of `n` values.

    Unbounded for fewer than two values, which say nothing of their spread. Of the differences
    within pairs, it is the paired t interval (Student, Biometrika 6, 1908).
    """
    if n < 2:
        return Interval(-math.inf, math.inf)
    half = -student_t_quantile((1 - confidence) / 2, n - 1) * deviation / math.sqrt(n)
    return Interval(mean - half, mean + half)


def _check_probability(p: float) -> None:
    if not 0 < p < 1:
        raise ValueError(f"a probability must be above 0 and below 1, not {p}")


def _two_sided(confidence: float) -> float:
    """Standard deviations to each side of the mean that hold `confidence` of a normal."""
    _check_probability(confidence)
    return -normal_quantile((1 - confidence) / 2)  # not of (1 + confidence) / 2, which rounds to 1


# --- pairs ------------------------------------------------------------------


def _distances(successes: int, n: int, confidence: float) -> tuple[float, float]:
    """From the proportion down and up to the ends of its Wilson interval."""
    low, high = wilson(successes, n, confidence)
    return successes / n - low, high - successes / n


def _correlation(counts: PairCounts) -> float:
    """Phi coefficient of the pairs, with Newcombe's correction of a positive one."""
    both, only_first, only_second, neither = counts
    margins = (
        (both + only_first)
        * (only_second + neither)
        * (both + only_second)
        * (only_first + neither)
    )
    if margins == 0:
        return 0.0
    product = float(both * neither - only_first * only_second)
    if product > 0:
        product = max(0.0, product - sum(counts) / 2)
    return product / math.sqrt(margins)


def _joined(one: float, other: float, correlation: float) -> float:
    # Not below 0 but for rounding, since the correlation is at most 1.
    return math.sqrt(max(0.0, one * one - 2 * correlation * one * other + other * other))


# --- Student's t ------------------------------------------------------------


def _t_near_normal(z: float, dof: float) -> float:
    """The t quantile by its expansion in 1/dof (Abramowitz and Stegun 26.7.5)."""
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92_160,
    )
    return math.fsum(term / dof**power for power, term in enumerate(terms))


def _t_of_upper_tail(tail: float, dof: float) -> float:
    """The t above which the probability is `tail`, below one half: by bisection."""
    low, high = 0.0, 1.0
    while _upper_tail(high, dof) > tail:
        low, high = high, high * 2
    while high - low > _RELATIVE_ERROR * high:
        middle = (low + high) / 2
        if middle in (low, high):
            break
        if _upper_tail(middle, dof) > tail:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def _upper_tail(t: float, dof: float) -> float:
    """Probability that Student's t is above `t`, which is at least 0 (A&S 26.7.1)."""
    square = t * t
    # Both parts of the whole by themselves: one less the other would lose the small one.
    return _incomplete_beta(dof / (dof + square), square / (dof + square), dof / 2, 0.5) / 2


def _incomplete_beta(x: float, rest: float, a: float, b: float) -> float:
    """Regularised incomplete beta function I_x(a, b); `rest` is 1 - x."""
    if x == 0.0 or rest == 0.0:
        return 1.0 - rest
    if x > (a + 1) / (a + b + 2):  # where the fraction converges slowly, its mirror does not
        return 1.0 - _incomplete_beta(rest, x, b, a)
    scale = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
    factor = math.exp(scale + a * math.log(x) + b * math.log(rest)) / a
    return factor * _beta_fraction(x, a, b)


def _beta_fraction(x: float, a: float, b: float) -> float:
    """The continued fraction of DLMF 8.17.22, by Lentz's method as Thompson and Barnett have it
    (J. Comput. Phys. 64, 1986)."""
    tiny = 1e-300
    ratio_c, ratio_d, value = 1.0, 0.0, 1.0
    for step in range(1, _MAX_TERMS):
        m = step // 2
        if step % 2 == 0:
            term = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        else:
            term = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        ratio_d = 1.0 / (1.0 + term * ratio_d or tiny)
        ratio_c = 1.0 + term / ratio_c or tiny
        value *= ratio_c * ratio_d
        if abs(ratio_c * ratio_d - 1.0) < 1e-15:
            break
    return 1.0 / value
