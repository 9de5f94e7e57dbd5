"""Scorers judge one answer each; a score table compares versions over all of them.

Scores are 0 or 1, or nats per token. Versions answer the same examples, so they are compared
example by example: what makes an example hard is hard for both, and cancels out.
"""

from __future__ import annotations

import enum
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from engine.intervals import Interval, PairCounts, paired_proportions, student_t, wilson


class Scorer(enum.Enum):
    """A way to judge an answer."""

    EXACT_MATCH = "exact_match"
    """1 if the answer is what was expected, space around both ignored."""
    CONTAINS = "contains"
    """1 if all wanted texts are in the answer, letter case ignored."""
    VALID_JSON = "valid_json"
    """1 if the answer is one JSON value."""
    LOG_LIKELIHOOD = "log_likelihood"
    """Mean log probability of the expected tokens, in nats per token; 0 is certainty."""

    @property
    def judges_text(self) -> bool:
        """Whether it needs a generated answer; its scores are 0 or 1 then."""
        return self is not Scorer.LOG_LIKELIHOOD


def exact_match(answer: str, expected: str) -> float:
    """1.0 if `answer` is `expected`, white space around both ignored."""
    return float(answer.strip() == expected.strip())


def contains_all(answer: str, wanted: Sequence[str]) -> float:
    """1.0 if each of `wanted` is in `answer`, letter case ignored as Unicode folds it."""
    folded = answer.casefold()
    return float(all(text.casefold() in folded for text in wanted))


def valid_json(answer: str) -> float:
    """1.0 if `answer` is one JSON value as RFC 8259 has it, white space around it ignored.

    NaN and Infinity, which Python's parser knows, are none. Neither is what is nested deeper
    than that parser goes, which is some hundred levels.
    """
    try:
        # Numbers stay text: those of over 4300 digits are valid, and Python refuses to convert.
        json.loads(answer, parse_constant=_refuse, parse_int=str, parse_float=str)
    except (ValueError, RecursionError):
        return 0.0
    return 1.0


def _refuse(constant: str) -> NoReturn:
    raise ValueError(constant)


def mean_logprob(logprobs: Sequence[float]) -> float:
    """Nats per token. Raises ValueError for no token, and for NaN or infinity."""
    if not logprobs:
        raise ValueError("there is no token to score")
    mean = math.fsum(logprobs) / len(logprobs) if all(map(math.isfinite, logprobs)) else math.nan
    if not math.isfinite(mean):
        raise ValueError("the model answers in NaN or infinity")
    return mean


@dataclass(frozen=True, slots=True)
class VersionScore:
    """How a version scored by itself."""

    version: int
    """0 is the base model."""
    scorer: Scorer
    mean: float
    interval: Interval
    """Of the mean, at 95 %: Wilson's for 0 or 1, Student's t otherwise."""
    count: int
    """Examples that were scored, at least 1."""


@dataclass(frozen=True, slots=True)
class ScoreDifference:
    """A version's mean score less that of the first, over the examples that both answered."""

    version: int
    scorer: Scorer
    difference: float
    """Above 0, the version is better than the first."""
    interval: Interval
    """Of the difference, at 95 %: Newcombe's paired one for 0 or 1, else the paired t."""

    @property
    def significant(self) -> bool:
        """Whether the interval leaves out 0. Each interval is for itself: of twenty equal
        pairs, one is expected to differ."""
        return self.interval.leaves_out(0.0)


class ScoreTable:
    """Scores by version, scorer and example, of which some may be missing."""

    def __init__(self, versions: Sequence[int], scorers: Sequence[Scorer], examples: int) -> None:
        """The first version is what the others are compared with."""
        self._versions = {version: row for row, version in enumerate(versions)}
        self._scorers = {scorer: row for row, scorer in enumerate(scorers)}
        # An array, because summing up 10,000 examples of 8 versions must not stop a stream.
        self._values = np.full((len(versions), len(scorers), examples), np.nan)

    def put(self, example: int, version: int, scores: Mapping[Scorer, float]) -> None:
        """Enter the scores of one answer. They are finite."""
        for scorer, score in scores.items():
            self._values[self._versions[version], self._scorers[scorer], example] = score

    def scores(self) -> list[VersionScore]:
        """Each version by each scorer, without those for which no example was scored."""
        return [
            VersionScore(version, scorer, float(values.mean()), _interval(scorer, values), n)
            for version in self._versions
            for scorer in self._scorers
            if (n := (values := _present(self._row(version, scorer))).size)
        ]

    def differences(self) -> list[ScoreDifference]:
        """Each version but the first by each scorer, without those that share no example."""
        first, *others = self._versions
        return [
            difference
            for version in others
            for scorer in self._scorers
            if (difference := self._difference(first, version, scorer)) is not None
        ]

    def _difference(self, first: int, second: int, scorer: Scorer) -> ScoreDifference | None:
        before, after = self._row(first, scorer), self._row(second, scorer)
        both = ~np.isnan(before) & ~np.isnan(after)
        if not both.any():
            return None
        before, after = before[both], after[both]
        gains = after - before
        if scorer.judges_text:
            interval = paired_proportions(
                PairCounts(
                    both=int((before * after).sum()),
                    only_first=int((gains < 0).sum()),
                    only_second=int((gains > 0).sum()),
                    neither=int((before + after == 0).sum()),
                )
            )
        else:
            interval = _mean_interval(gains)
        return ScoreDifference(second, scorer, float(gains.mean()), interval)

    def _row(self, version: int, scorer: Scorer) -> NDArray[np.float64]:
        row: NDArray[np.float64] = self._values[self._versions[version], self._scorers[scorer]]
        return row


def _present(values: NDArray[np.float64]) -> NDArray[np.float64]:
    present: NDArray[np.float64] = values[~np.isnan(values)]
    return present


def _interval(scorer: Scorer, values: NDArray[np.float64]) -> Interval:
    if scorer.judges_text:
        return wilson(int(values.sum()), values.size)
    return _mean_interval(values)


def _mean_interval(values: NDArray[np.float64]) -> Interval:
    deviation = float(values.std(ddof=1)) if values.size > 1 else 0.0
    return student_t(float(values.mean()), deviation, values.size)
