"""PromQL computed over scripted series: as much of it as our rules use, and no more.

The grammar is promql-parser's. What is computed follows Prometheus 2: a sample is seen for five
minutes, `rate` and `increase` extrapolate to the edges of their range, `histogram_quantile`
interpolates within a bucket. `promtool test rules` computes the same cases where it is installed.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import promql_parser as grammar

LOOKBACK_S = 300.0

Labels = frozenset[tuple[str, str]]
Vector = dict[Labels, float]
Value = Vector | float
"""An instant vector, or a scalar."""


@dataclass(frozen=True, slots=True)
class Series:
    """One series, its name among the labels as `__name__`."""

    labels: Labels
    samples: Sequence[tuple[float, float]]
    """Times in seconds and values, in order."""


def labels_of(selector: str) -> Labels:
    """Labels that a series has which is written as a selector."""
    parsed = grammar.parse(selector)
    assert isinstance(parsed, grammar.VectorSelector)
    found = {(matcher.name, matcher.value) for matcher in parsed.matchers.matchers}
    return frozenset(found | {("__name__", parsed.name or "")})


def evaluate(expression: str, series: Iterable[Series], time_s: float) -> Vector:
    """The vector that an expression is at that time."""
    value = _Evaluation([*series], time_s).of(grammar.parse(expression))
    assert isinstance(value, dict), "a scalar"
    return value


ARITHMETIC: Mapping[str, Callable[[float, float], float]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": lambda left, right: left / right if right else math.nan,
}
COMPARISONS: Mapping[str, Callable[[float, float], bool]] = {
    "==": operator.eq,
    "!=": operator.ne,
    ">": operator.gt,
    "<": operator.lt,
    ">=": operator.ge,
    "<=": operator.le,
}
AGGREGATES: Mapping[str, Callable[[Sequence[float]], float]] = {
    "sum": math.fsum,
    "min": min,
    "max": max,
    "count": len,
    "avg": lambda values: math.fsum(values) / len(values),
}


class _Evaluation:
    """All of one expression at one time."""

    def __init__(self, series: Sequence[Series], time_s: float) -> None:
        self._series = series
        self._time_s = time_s

    def of(self, node: Any) -> Value:
        match node:
            case grammar.ParenExpr():
                return self.of(node.expr)
            case grammar.NumberLiteral():
                return float(node.val)
            case grammar.VectorSelector():
                return self._instant(node)
            case grammar.AggregateExpr():
                return self._aggregate(node)
            case grammar.BinaryExpr():
                return self._binary(node)
            case grammar.Call():
                return self._call(node)
        raise NotImplementedError(node.prettify())

    def _instant(self, selector: Any) -> Vector:
        found = {}
        for series in self._selected(selector):
            seen = [value for time_s, value in series.samples if self._is_seen(time_s, LOOKBACK_S)]
            if seen:
                found[series.labels] = seen[-1]
        return found

    def _selected(self, selector: Any) -> list[Series]:
        assert selector.offset is None and selector.at is None
        matchers = selector.matchers.matchers
        return [
            series
            for series in self._series
            if ("__name__", selector.name) in series.labels
            and all(_matches(matcher, dict(series.labels)) for matcher in matchers)
        ]

    def _is_seen(self, time_s: float, range_s: float) -> bool:
        return self._time_s - range_s <= time_s <= self._time_s

    def _call(self, node: Any) -> Vector:
        name = node.func.name
        if name == "histogram_quantile":
            quantile, vector = (self.of(argument) for argument in node.args)
            assert isinstance(quantile, float) and isinstance(vector, dict)
            return _histogram_quantile(quantile, vector)
        (matrix,) = node.args
        range_s = matrix.range.total_seconds()
        found = {}
        for series in self._selected(matrix.vector_selector):
            samples = [sample for sample in series.samples if self._is_seen(sample[0], range_s)]
            value = self._over_range(name, samples, range_s)
            if value is not None:
                found[_without(series.labels, {"__name__"})] = value
        return found

    def _over_range(
        self, name: str, samples: Sequence[tuple[float, float]], range_s: float
    ) -> float | None:
        values = [value for _, value in samples]
        match name:
            case "avg_over_time":
                return math.fsum(values) / len(values) if values else None
            case "increase":
                return _increase(samples, self._time_s - range_s, self._time_s)
            case "rate":
                increase = _increase(samples, self._time_s - range_s, self._time_s)
                return None if increase is None else increase / range_s
        raise NotImplementedError(name)

    def _aggregate(self, node: Any) -> Vector:
        vector = self.of(node.expr)
        assert isinstance(vector, dict) and node.param is None
        by: Sequence[str] = ()
        if node.modifier is not None:
            assert node.modifier.type == grammar.AggModifierType.By
            by = node.modifier.labels
        groups: dict[Labels, list[float]] = {}
        for labels, value in vector.items():
            groups.setdefault(_only(labels, by), []).append(value)
        return {group: AGGREGATES[str(node.op)](values) for group, values in groups.items()}

    def _binary(self, node: Any) -> Value:
        left, right, token = self.of(node.lhs), self.of(node.rhs), str(node.op)
        if isinstance(left, float) and isinstance(right, float):
            return ARITHMETIC[token](left, right)
        pairs = _pairs(left, right, node.modifier)
        if token == "and":
            assert isinstance(left, dict)
            return {labels: left[labels] for labels, _, _ in pairs}
        if token in COMPARISONS:  # it keeps the left side, name and all
            return {labels: one for labels, one, other in pairs if COMPARISONS[token](one, other)}
        return {
            _without(labels, {"__name__"}): ARITHMETIC[token](one, other)
            for labels, one, other in pairs
        }


def _pairs(left: Value, right: Value, modifier: Any) -> list[tuple[Labels, float, float]]:
    """What stands beside what, under the labels of the vector or of the left one."""
    if isinstance(left, float):
        assert isinstance(right, dict)
        return [(labels, left, value) for labels, value in right.items()]
    if isinstance(right, float):
        return [(labels, value, right) for labels, value in left.items()]
    on = None
    if modifier is not None and modifier.matching is not None:
        assert modifier.matching.type == grammar.LabelModifierType.Include
        assert modifier.group_labels is None
        on = modifier.matching.labels

    def key(labels: Labels) -> Labels:
        return _without(labels, {"__name__"}) if on is None else _only(labels, on)

    others = {key(labels): value for labels, value in right.items()}
    return [
        (labels, value, others[key(labels)])
        for labels, value in left.items()
        if key(labels) in others
    ]


def _matches(matcher: Any, labels: Mapping[str, str]) -> bool:
    value = labels.get(matcher.name, "")
    if matcher.op == grammar.MatchOp.Equal:
        return bool(value == matcher.value)
    if matcher.op == grammar.MatchOp.NotEqual:
        return bool(value != matcher.value)
    found = re.fullmatch(matcher.value, value) is not None
    return found if matcher.op == grammar.MatchOp.Re else not found


def _only(labels: Labels, names: Iterable[str]) -> Labels:
    kept = {*names}
    return frozenset((name, value) for name, value in labels if name in kept)


def _without(labels: Labels, names: Iterable[str]) -> Labels:
    dropped = {*names}
    return frozenset((name, value) for name, value in labels if name not in dropped)


def _increase(samples: Sequence[tuple[float, float]], begin_s: float, end_s: float) -> float | None:
    """As `extrapolatedRate` of Prometheus does: up to the edges of the range if the samples come
    close to them, and never below where the counter would have been 0."""
    if len(samples) < 2:
        return None
    (first_s, first), (last_s, last) = samples[0], samples[-1]
    grown = last - first
    for (_, before), (_, after) in pairwise(samples):
        grown += before if after < before else 0.0  # it began anew
    sampled_s = last_s - first_s
    apart_s = sampled_s / (len(samples) - 1)
    to_begin_s, to_end_s = first_s - begin_s, end_s - last_s
    if grown > 0 and first >= 0:
        to_begin_s = min(to_begin_s, sampled_s * first / grown)
    covered_s = sampled_s
    for gap_s in (to_begin_s, to_end_s):
        covered_s += gap_s if gap_s < 1.1 * apart_s else apart_s / 2
    return grown * covered_s / sampled_s


def _histogram_quantile(quantile: float, vector: Vector) -> Vector:
    histograms: dict[Labels, list[tuple[float, float]]] = {}
    for labels, count in vector.items():
        edge = float(dict(labels)["le"].replace("Inf", "inf"))
        histograms.setdefault(_without(labels, {"le", "__name__"}), []).append((edge, count))
    return {labels: _quantile(quantile, sorted(buckets)) for labels, buckets in histograms.items()}


def _quantile(quantile: float, buckets: Sequence[tuple[float, float]]) -> float:
    top, total = buckets[-1]
    if top != math.inf or len(buckets) < 2 or not total > 0:
        return math.nan
    rank = quantile * total
    low, below = 0.0, 0.0
    for edge, count in buckets[:-1]:
        if count >= rank:
            return low + (edge - low) * (rank - below) / (count - below)
        low, below = edge, count
    return low
