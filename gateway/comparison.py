"""How versions did on live traffic, and how sure their differences are.

Every interval is of the difference between an arm and the baseline, two independent samples:

- Of error ratios: Newcombe's hybrid score interval, which joins two Wilson intervals (Newcombe,
  Statistics in Medicine 17, 1998, pages 873-890, method 10).
- Of means: Welch's t interval, for unequal variances (Welch, Biometrika 34, 1947).
- Of quantiles: the percentile bootstrap (Efron and Tibshirani, An Introduction to the Bootstrap,
  1993, chapter 13), from a fixed seed. Which value a resample has at some rank is decided by the
  uniform number that has this rank among as many, which is beta distributed (David and Nagaraja,
  Order Statistics, 2003, section 2.3): one draw stands for a resample of all values.

Nothing corrects for several measures or arms: of 20 true equalities, about one is called
significant at a confidence of 0.95.
"""

from __future__ import annotations

import enum
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from engine.intervals import Interval, student_t_quantile, wilson
from gateway.arms import OK, Outcome
from store.records import FeedbackSummary

SERVER_ERRORS = frozenset(
    {"DEADLINE_EXCEEDED", "INTERNAL", "RESOURCE_EXHAUSTED", "UNAVAILABLE", "UNKNOWN"}
)
"""Codes that are errors of the server. What callers did wrong or gave up says nothing of a
version."""

MIN_VALUES = 2
"""Of each arm, for any interval: one value says nothing of its spread."""
RESAMPLES = 4_000
SEED = 1_729
"""The same requests get the same intervals."""

_Floats: TypeAlias = NDArray[np.float64]


class Measure(enum.StrEnum):
    """What a difference is of. The values are the contract's."""

    ERROR_RATIO = "error_ratio"
    TTFT_P50 = "ttft_ms.p50"
    TTFT_P95 = "ttft_ms.p95"
    INTER_TOKEN_P50 = "inter_token_ms.p50"
    INTER_TOKEN_P95 = "inter_token_ms.p95"
    TOTAL_P50 = "total_ms.p50"
    TOTAL_P95 = "total_ms.p95"
    COMPLETION_TOKENS_MEAN = "completion_tokens.mean"
    FEEDBACK_MEAN = "feedback.mean"


@dataclass(frozen=True, slots=True)
class Quantiles:
    """Of one measure over an arm's requests; linear between the two nearest values."""

    count: int
    """Requests that have the measure; 0: the other fields mean nothing."""
    mean: float
    p50: float
    p90: float
    p95: float
    p99: float


@dataclass(frozen=True, slots=True)
class ArmReport:
    """How one version did."""

    version: int
    request_count: int
    codes: Mapping[str, int]
    """Requests by the name of their status code."""
    finish_reasons: Mapping[str, int]
    """Completions by finish reason."""
    ttft_ms: Quantiles
    """Of requests that got a token."""
    inter_token_ms: Quantiles
    """Of requests that got a second one."""
    total_ms: Quantiles
    """Of requests that ended OK."""
    completion_tokens: Quantiles
    """Of requests that ended OK: the others were cut short."""
    prompt_tokens_total: int
    completion_tokens_total: int
    """Of all requests, as the one above."""
    feedback: FeedbackSummary


@dataclass(frozen=True, slots=True)
class ArmDifference:
    """One measure of an arm less that of the baseline."""

    version: int
    measure: Measure
    difference: float
    low: float
    """Ends of the confidence interval."""
    high: float

    @property
    def significant(self) -> bool:
        """Whether the interval leaves out 0."""
        return Interval(self.low, self.high).leaves_out(0.0)


@dataclass(frozen=True, slots=True)
class Comparison:
    """Arms in the order that was asked for, and how all but the first differ from that."""

    arms: tuple[ArmReport, ...]
    differences: tuple[ArmDifference, ...]


def compare(
    arms: Mapping[int, Sequence[Outcome]],
    feedback: Mapping[int, FeedbackSummary],
    confidence: float,
) -> Comparison:
    """Compare versions by their requests and their scores; the first is the baseline.

    A measure is left out of an arm's differences if one of the two has fewer than two values for
    it, or for a quantile so few that all of them might well lie on one side of it: at a
    confidence of 0.95, fewer than 6 for the median and 59 for the 95th percentile. Means of
    values without any spread get an interval without width.

    Takes under 50 ms for two arms of 10,000 requests. Raises ValueError unless
    0 < confidence < 1.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be above 0 and below 1, not {confidence}")
    random = np.random.default_rng(SEED)
    samples = [
        _Sample(version, outcomes, feedback.get(version, FeedbackSummary(0, 0.0, 0.0)))
        for version, outcomes in arms.items()
    ]
    differences = [
        ArmDifference(sample.version, measure, difference, interval.low, interval.high)
        for sample in samples[1:]
        for measure, difference, interval in _differences(sample, samples[0], confidence, random)
        if math.isfinite(interval.low) and math.isfinite(interval.high)  # scores may be huge
    ]
    return Comparison(tuple(sample.report() for sample in samples), tuple(differences))


class _Mean(NamedTuple):
    """A mean and what is needed to know how sure it is."""

    size: int
    value: float
    deviation: float
    """Standard deviation of the sample; 0.0 below two values."""


class _Sample:
    """The values of one arm, each array in ascending order."""

    def __init__(
        self, version: int, outcomes: Sequence[Outcome], feedback: FeedbackSummary
    ) -> None:
        ended_ok = [outcome for outcome in outcomes if outcome.code == OK]
        self.version = version
        self.count = len(outcomes)
        self.errors = sum(outcome.code in SERVER_ERRORS for outcome in outcomes)
        self.ttft_ms = _sorted_ms(outcome.ttft_s for outcome in outcomes)
        self.inter_token_ms = _sorted_ms(outcome.inter_token_s for outcome in outcomes)
        self.total_ms = _sorted_ms(outcome.total_s for outcome in ended_ok)
        self.completion_tokens = _sorted(outcome.completion_tokens for outcome in ended_ok)
        self._feedback = feedback
        self._outcomes = outcomes

    @property
    def feedback_mean(self) -> _Mean:
        feedback = self._feedback
        return _Mean(feedback.count, feedback.mean, feedback.standard_deviation)

    @property
    def completion_tokens_mean(self) -> _Mean:
        tokens = self.completion_tokens
        if tokens.size < MIN_VALUES:
            return _Mean(tokens.size, float(tokens.sum()), 0.0)
        return _Mean(tokens.size, float(tokens.mean()), float(tokens.std(ddof=1)))

    def report(self) -> ArmReport:
        return ArmReport(
            version=self.version,
            request_count=self.count,
            codes=Counter(outcome.code for outcome in self._outcomes),
            finish_reasons=Counter(
                reason for outcome in self._outcomes for reason in outcome.finish_reasons
            ),
            ttft_ms=_quantiles(self.ttft_ms),
            inter_token_ms=_quantiles(self.inter_token_ms),
            total_ms=_quantiles(self.total_ms),
            completion_tokens=_quantiles(self.completion_tokens),
            prompt_tokens_total=sum(outcome.prompt_tokens for outcome in self._outcomes),
            completion_tokens_total=sum(outcome.completion_tokens for outcome in self._outcomes),
            feedback=self._feedback,
        )


_QUANTILES: tuple[tuple[Measure, float, Callable[[_Sample], _Floats]], ...] = (
    (Measure.TTFT_P50, 0.50, lambda sample: sample.ttft_ms),
    (Measure.TTFT_P95, 0.95, lambda sample: sample.ttft_ms),
    (Measure.INTER_TOKEN_P50, 0.50, lambda sample: sample.inter_token_ms),
    (Measure.INTER_TOKEN_P95, 0.95, lambda sample: sample.inter_token_ms),
    (Measure.TOTAL_P50, 0.50, lambda sample: sample.total_ms),
    (Measure.TOTAL_P95, 0.95, lambda sample: sample.total_ms),
)


def _differences(
    arm: _Sample, base: _Sample, confidence: float, random: np.random.Generator
) -> Iterator[tuple[Measure, float, Interval]]:
    """Measure, difference and interval of all that can be told, in the contract's order."""
    if min(arm.count, base.count) >= MIN_VALUES:
        difference = arm.errors / arm.count - base.errors / base.count
        yield Measure.ERROR_RATIO, difference, _newcombe(arm, base, confidence)
    for measure, p, values_of in _QUANTILES:
        values, base_values = values_of(arm), values_of(base)
        if _can_bracket(min(values.size, base_values.size), p, confidence):
            difference = float(np.quantile(values, p) - np.quantile(base_values, p))
            draws = _resampled(values, p, random) - _resampled(base_values, p, random)
            ends = np.quantile(draws, ((1 - confidence) / 2, (1 + confidence) / 2))
            yield measure, difference, Interval(float(ends[0]), float(ends[1]))
    for measure, mean, base_mean in (
        (
            Measure.COMPLETION_TOKENS_MEAN,
            arm.completion_tokens_mean,
            base.completion_tokens_mean,
        ),
        (Measure.FEEDBACK_MEAN, arm.feedback_mean, base.feedback_mean),
    ):
        if min(mean.size, base_mean.size) >= MIN_VALUES:
            yield measure, mean.value - base_mean.value, _welch(mean, base_mean, confidence)


def _newcombe(arm: _Sample, base: _Sample, confidence: float) -> Interval:
    """Of the difference of two error ratios."""
    ratio, base_ratio = arm.errors / arm.count, base.errors / base.count
    low, high = wilson(arm.errors, arm.count, confidence)
    base_low, base_high = wilson(base.errors, base.count, confidence)
    difference = ratio - base_ratio
    return Interval(
        difference - math.hypot(ratio - low, base_high - base_ratio),
        difference + math.hypot(high - ratio, base_ratio - base_low),
    )


def _welch(arm: _Mean, base: _Mean, confidence: float) -> Interval:
    """Of the difference of two means."""
    error = arm.deviation / math.sqrt(arm.size)
    base_error = base.deviation / math.sqrt(base.size)
    difference, joint = arm.value - base.value, math.hypot(error, base_error)
    if not math.isfinite(joint):
        return Interval(-math.inf, math.inf)
    if joint == 0.0:
        return Interval(difference, difference)
    # Welch and Satterthwaite's degrees of freedom, by shares, whose squares do not overflow.
    share = (error / joint) ** 2
    base_share = (base_error / joint) ** 2
    dof = 1 / (share**2 / (arm.size - 1) + base_share**2 / (base.size - 1))
    half = -student_t_quantile((1 - confidence) / 2, dof) * joint
    return Interval(difference - half, difference + half)


def _can_bracket(count: int, p: float, confidence: float) -> bool:
    """Whether so many values have their p-quantile between them with that confidence.

    With fewer no interval that ends at values of the sample can hold what it says (David and
    Nagaraja, section 7.1); in simulations the bootstrap's then hold far less.
    """
    return count >= MIN_VALUES and p**count + (1 - p) ** count <= 1 - confidence


def _resampled(values: _Floats, p: float, random: np.random.Generator) -> _Floats:
    """The p-quantile of each of RESAMPLES resamples of `values`, which ascend.

    As `np.quantile` has it: between the order statistics k and k + 1 (from 1) of a resample,
    which are the values at the ranks of the uniform order statistics k and k + 1. The first is
    Beta(k, n - k + 1), the next the least of the n - k that are spread evenly above it.
    """
    n = values.size
    rest, whole = math.modf(p * (n - 1))
    k = int(whole) + 1
    lower = random.beta(k, n - k + 1, RESAMPLES)
    upper = lower + (1 - lower) * random.beta(1, n - k, RESAMPLES)
    low, high = (values[np.minimum((rank * n).astype(int), n - 1)] for rank in (lower, upper))
    resampled: _Floats = low + rest * (high - low)
    return resampled


def _quantiles(values: _Floats) -> Quantiles:
    if not values.size:
        return Quantiles(0, 0.0, 0.0, 0.0, 0.0, 0.0)
    p50, p90, p95, p99 = (float(value) for value in np.quantile(values, (0.5, 0.9, 0.95, 0.99)))
    return Quantiles(values.size, float(values.mean()), p50, p90, p95, p99)


def _sorted(values: Iterable[float]) -> _Floats:
    return np.sort(np.fromiter(values, np.float64))


def _sorted_ms(values_s: Iterable[float | None]) -> _Floats:
    return _sorted(value_s * 1000 for value_s in values_s if value_s is not None)
