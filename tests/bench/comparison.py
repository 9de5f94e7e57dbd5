"""All sides measured in turns, so that what else the machine does falls on each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import TypeVar

from tests.bench.front_end import FrontEnd, Kind
from tests.bench.workload import Workload

WARM_UP_REQUESTS = 128

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Throughput:
    """Rounds of one workload on every side that serves it."""

    workload: Workload
    requests_per_s: Mapping[Kind, Sequence[float]]
    """Of each round; the rounds of equal number were in one turn."""
    texts: Mapping[Kind, str]
    """The answer to one request, taken before."""

    @property
    def unlike(self) -> list[Kind]:
        """Sides that gave another answer than the first one."""
        first = next(iter(self.texts.values()))
        return [kind for kind, text in self.texts.items() if text != first]

    def median(self, kind: Kind) -> float:
        """Requests per second of a side."""
        return median(self.requests_per_s[kind])

    def ratio(self, kind: Kind, base: Kind) -> float:
        """Of medians."""
        return self.median(kind) / self.median(base)

    def ratios(self, kind: Kind, base: Kind) -> list[float]:
        """Of each turn."""
        both = zip(self.requests_per_s[kind], self.requests_per_s[base], strict=True)
        return [ours / theirs for ours, theirs in both]


@dataclass(frozen=True, slots=True)
class FirstTokens:
    """Blocks of times to first token of one workload, in seconds, on every side that serves it."""

    name: str
    workload: Workload
    blocks_s: Mapping[Kind, Sequence[Sequence[float]]]

    def median_s(self, kind: Kind) -> float:
        """Of all requests to a side."""
        return median(seconds for block in self.blocks_s[kind] for seconds in block)

    def added_s(self, kind: Kind, base: Kind) -> float:
        """Difference of medians."""
        return self.median_s(kind) - self.median_s(base)

    def added_by_block_s(self, kind: Kind, base: Kind) -> list[float]:
        """Difference of the medians of each turn."""
        both = zip(self.blocks_s[kind], self.blocks_s[base], strict=True)
        return [median(ours) - median(theirs) for ours, theirs in both]


def compare_throughput(sides: Sequence[FrontEnd], workload: Workload, rounds: int) -> Throughput:
    """Measure all sides that serve it. Raises LoadFailed or CallsFailed."""
    sides = [side for side in sides if side.serves(workload.adapter)]
    texts = {side.kind: side.text(workload) for side in sides}
    warm_up = replace(workload, requests=min(WARM_UP_REQUESTS, workload.in_flight))
    for side in sides:
        side.round(warm_up)
    measured = _in_turns(
        sides, rounds, lambda side: workload.requests / side.round(workload).seconds
    )
    return Throughput(workload, measured, texts)


def compare_first_tokens(
    name: str, sides: Sequence[FrontEnd], workload: Workload, blocks: int
) -> FirstTokens:
    """Measure all sides that serve it, one request at a time. Raises CallsFailed."""
    sides = [side for side in sides if side.serves(workload.adapter)]
    for side in sides:
        side.first_tokens(workload)
    measured = _in_turns(sides, blocks, lambda side: side.first_tokens(workload))
    return FirstTokens(name, workload, measured)


def _in_turns(
    sides: Sequence[FrontEnd], turns: int, measure: Callable[[FrontEnd], T]
) -> dict[Kind, list[T]]:
    measured: dict[Kind, list[T]] = {side.kind: [] for side in sides}
    for turn in range(turns):
        for side in in_turn(sides, turn):
            measured[side.kind].append(measure(side))
    return measured


def in_turn(sides: Sequence[T], turn: int) -> Iterator[T]:
    """The sides in the order of this turn: each begins in its time, and none always follows the
    same other."""
    first = turn // 2 % len(sides)
    order = [*sides[first:], *sides[:first]]
    return iter(order if turn % 2 == 0 else order[::-1])
