"""Both sides measured in turns, so that what else the machine does falls on both."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import median
from typing import TypeVar

from tests.bench.served import ServedSide
from tests.bench.side import Side
from tests.bench.workload import Round, Workload

MIN_PAIRS = 5
WARM_UP_REQUESTS = 128

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class ThroughputComparison:
    """Pairs of rounds of one workload: bare, served."""

    name: str
    workload: Workload
    pairs: list[tuple[Round, Round]]

    @property
    def ratios(self) -> list[float]:
        """Served over bare, of each pair."""
        return [served.tokens_per_s / bare.tokens_per_s for bare, served in self.pairs]


@dataclass(frozen=True, slots=True)
class FirstTokenComparison:
    """Pairs of blocks of times to first token, in seconds: bare, served."""

    name: str
    workload: Workload
    pairs: list[tuple[list[float], list[float]]]

    @property
    def bare_s(self) -> float:
        """Median of all requests to the bare engine."""
        return median(seconds for bare, _ in self.pairs for seconds in bare)

    @property
    def served_s(self) -> float:
        """Median of all requests to the gateway."""
        return median(seconds for _, served in self.pairs for seconds in served)

    @property
    def added_s(self) -> list[float]:
        """What the gateway adds to the median, of each pair of blocks."""
        return [median(served) - median(bare) for bare, served in self.pairs]


def compare_throughput(
    name: str, workload: Workload, bare: Side, served: ServedSide, *, rounds: int, limit_s: float
) -> ThroughputComparison:
    """Measure `rounds` pairs; fewer, but MIN_PAIRS, once `limit_s` have passed."""
    warm_up = replace(workload, requests=WARM_UP_REQUESTS)
    bare.round(warm_up)
    served.round(warm_up)
    pairs = _in_turns(lambda: bare.round(workload), lambda: served.round(workload), rounds, limit_s)
    return ThroughputComparison(name, workload, pairs)


def compare_first_tokens(
    name: str, workload: Workload, bare: Side, served: ServedSide, *, blocks: int, limit_s: float
) -> FirstTokenComparison:
    """Measure `blocks` pairs, one request at a time; fewer once `limit_s` have passed."""
    bare.first_tokens(workload)
    served.first_tokens(workload)
    pairs = _in_turns(
        lambda: bare.first_tokens(workload),
        lambda: served.first_tokens(workload),
        blocks,
        limit_s,
    )
    return FirstTokenComparison(name, workload, pairs)


def _in_turns(
    bare: Callable[[], T], served: Callable[[], T], pairs: int, limit_s: float
) -> list[tuple[T, T]]:
    """Bare, served, served, bare, and so on: neither side always follows the other."""
    end_s = time.monotonic() + limit_s
    measured: list[tuple[T, T]] = []
    while len(measured) < pairs and (len(measured) < MIN_PAIRS or time.monotonic() < end_s):
        if len(measured) % 2 == 0:
            first = bare()
            measured.append((first, served()))
        else:
            second = served()
            measured.append((bare(), second))
    return measured
