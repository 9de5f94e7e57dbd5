"""How evenly adapters and their load are spread over shards, what moves, and what a choice costs.

8 shards and 1,000 adapters, requests after Zipf's law with exponent 1, always as many in flight.
Answers take 20 ms a token and have 200 on average, exponentially distributed, and the planner
learns of them on a clock that the simulation drives. With several workers each places its own
requests by what it has in flight itself. All figures but the times are the same in every run. The
exit code is 0 whenever it could measure: a missed target is printed as missed.

    python -m tests.bench.ring
"""

from __future__ import annotations

import argparse
import heapq
import math
import random
import statistics
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import accumulate
from typing import NamedTuple
from unittest.mock import patch

from engine import replication, ring
from engine.replication import Planner
from engine.ring import AdapterKey, Reason, Ring, ShardState
from tests.bench.machine import Machine

SHARDS, ADAPTERS = 8, 1_000
TOKENS, TOKEN_S = 200, 0.02
PLAN_INTERVAL_S = 5.0
WARM_UP_S = 300.0
REQUESTS = 10_000
"""That are measured, after the warm-up."""
MAX_CPU_LORAS = 64

TARGET_MAX_OVER_MEAN = 1.25
TARGET_PLANNED = 0.95
TARGET_CHOICE_US = 5.0
SIGMAS = 3.0

TIMED_SHARDS = (8, 64)
TIMED_CHOICES, TIMED_ROUNDS = 20_000, 9


class Case(NamedTuple):
    """A line of the first table."""

    name: str
    in_flight: int
    workers: int = 1
    constants: Mapping[str, float] = {}
    """Of the ring and the planner, where they are other ones than ours."""
    has_targets: bool = False


NO_CAP: dict[str, float] = {"CAP": SHARDS, "CAP_OF_FEW": SHARDS}
NO_REPLICAS: dict[str, float] = {"ALPHA": 1 / SHARDS}
CASES = (
    Case("no least cap", 8, constants={"LEAST_CAP": 1}),
    Case("cap and replicas", 8),
    Case("rendezvous alone", 64, constants=NO_CAP | NO_REPLICAS),
    Case("cap alone", 64, constants=NO_REPLICAS),
    Case("1.25 for few too", 64, constants={"CAP_OF_FEW": 1.25}),
    Case("cap and replicas", 64),
    Case("cap and replicas", 64, workers=4),
    Case("rendezvous alone", 512, constants=NO_CAP | NO_REPLICAS),
    Case("cap alone", 512, constants=NO_REPLICAS),
    Case("cap and replicas", 512, has_targets=True),
    Case("cap and replicas", 512, workers=4, has_targets=True),
)


class Spread(NamedTuple):
    """What one simulated run shows."""

    copies: int
    """Replicas beyond the first, at the end."""
    average: float
    """Load of the fullest shard over the mean, averaged over time."""
    worst: float
    """The same at the worst moment."""
    planned: float
    """Share of requests that went to one of the adapter's replicas."""


class Moves(NamedTuple):
    """What happens to the adapters' first shards when one is added, and when it goes again."""

    share: float
    """Of the adapters that moved."""
    strays: int
    """Adapters that moved between shards that stayed."""


class Simulation:
    """Requests that come and go, with a plan that follows them."""

    def __init__(self, seed: int, in_flight: int, workers: int) -> None:
        self._random = random.Random(seed)
        self._keys = adapters(seed)
        self._cumulated = list(accumulate(1 / rank for rank in range(1, ADAPTERS + 1)))
        self._in_flight = in_flight
        self._ring = Ring(dict.fromkeys(shard_names(SHARDS), ShardState.UP))
        self._workers = [dict.fromkeys(self._ring.shards, 0) for _ in range(workers)]
        self._loads = dict.fromkeys(self._ring.shards, 0)
        """Over all workers, which none of them sees."""
        self._running: Counter[tuple[AdapterKey, str]] = Counter()
        self._now_s = 0.0
        self._planner = Planner(MAX_CPU_LORAS, lambda: self._now_s)

    def run(self) -> Spread:
        """Warm up, and then measure."""
        mean = self._in_flight / SHARDS
        peaks, reasons = [], Counter[Reason]()
        for reason in self._reasons():
            if self._now_s < WARM_UP_S:
                continue
            peaks.append(max(self._loads.values()) / mean)
            reasons[reason] += 1
            if len(peaks) == REQUESTS:
                break
        copies = sum(count - 1 for _, count in self._ring.plan.replicas)
        planned = reasons[Reason.PLANNED] / reasons.total()
        return Spread(copies, statistics.fmean(peaks), max(peaks), planned)

    def _reasons(self) -> Iterator[Reason]:
        """Why each request went where it went, with all in flight."""
        ends: list[tuple[float, int, AdapterKey, str, dict[str, int], int]] = []
        plan_s, number = PLAN_INTERVAL_S, 0
        while True:
            number += 1
            if len(ends) == self._in_flight:
                self._now_s, _, key, shard, loads, tokens = heapq.heappop(ends)
                loads[shard] -= 1
                self._loads[shard] -= 1
                self._running[key, shard] -= 1
                self._planner.record(key, tokens)
            if self._now_s >= plan_s:
                plan_s += PLAN_INTERVAL_S
                plan = self._planner.plan(self._ring, lambda *copy: self._running[copy] > 0)
                self._ring = self._ring.with_plan(plan)
            loads = self._random.choice(self._workers)
            key = self._random.choices(self._keys, cum_weights=self._cumulated)[0]
            shard, reason = self._ring.choose(key, loads)[:2]
            loads[shard] += 1
            self._loads[shard] += 1
            self._running[key, shard] += 1
            tokens = math.ceil(self._random.expovariate(1 / TOKENS))
            heapq.heappush(
                ends, (self._now_s + tokens * TOKEN_S, number, key, shard, loads, tokens)
            )
            if len(ends) == self._in_flight:
                yield reason


def shard_names(count: int) -> list[str]:
    """Names as `gateway serve` gives them."""
    return [f"shard-{number}" for number in range(count)]


def adapters(seed: int) -> list[AdapterKey]:
    """Other ones for each seed, the most popular first."""
    return [AdapterKey("bench", f"adapter-{seed}-{number}") for number in range(ADAPTERS)]


def firsts(shards: Sequence[str], keys: Sequence[AdapterKey]) -> list[str]:
    """First shard of each adapter."""
    ring = Ring(dict.fromkeys(shards, ShardState.UP))
    return [ring.ranked(key)[0] for key in keys]


def added(seed: int) -> Moves:
    """A ninth shard comes."""
    keys, before = adapters(seed), shard_names(SHARDS)
    after = shard_names(SHARDS + 1)
    moved = [
        new
        for old, new in zip(firsts(before, keys), firsts(after, keys), strict=True)
        if new != old
    ]
    return Moves(len(moved) / ADAPTERS, sum(new != after[-1] for new in moved))


def removed(seed: int) -> Moves:
    """One of the eight goes."""
    keys, before = adapters(seed), shard_names(SHARDS)
    gone = before[seed % SHARDS]
    after = [name for name in before if name != gone]
    pairs = list(zip(firsts(before, keys), firsts(after, keys), strict=True))
    moved = sum(new != old for old, new in pairs)
    return Moves(moved / ADAPTERS, sum((new != old) != (old == gone) for old, new in pairs))


def choice_us(shards: int, open_shards: int, *, kept: bool) -> float:
    """Processor time of one choice, in microseconds, in the fastest of TIMED_ROUNDS.

    `kept` is whether the adapter's order was found before.
    """
    generator = random.Random(0)
    names = shard_names(shards)
    ring = Ring(dict.fromkeys(names, ShardState.UP))
    for name in names[open_shards:]:
        ring = ring.with_state(name, ShardState.DOWN)
    weights = list(accumulate(1 / rank for rank in range(1, ADAPTERS + 1)))
    loads = {name: generator.randint(50, 70) for name in names}
    times_s = []
    for number in range(TIMED_ROUNDS):
        keys = generator.choices(adapters(0), cum_weights=weights, k=TIMED_CHOICES)
        if not kept:
            keys = [AdapterKey(f"{number}", f"{each}") for each in range(TIMED_CHOICES // 10)]
        begin_s = time.process_time()
        for key in keys:
            ring.choose(key, loads)
        times_s.append((time.process_time() - begin_s) / len(keys))
    return min(times_s) * 1e6


def main() -> None:
    """Entry of the command."""
    options = _options()
    seeds = range(options.seeds)
    print(Machine.here())
    print(
        f"{SHARDS} shards, {ADAPTERS:,} adapters, Zipf(1); {len(seeds)} seeds, each "
        f"{REQUESTS:,} requests after {WARM_UP_S:g} s"
    )
    print("\nLoad of the fullest shard over the mean, and requests on planned replicas")
    print(_row("", "in flight", "workers", "copies", "average", "worst", "planned", "worst seed"))
    for case in CASES:
        _print_spread(case, seeds)
    print("\nAdapters whose first shard changes")
    print(_row("", "average", "worst seed", "strays"))
    _print_moves(seeds)
    print(f"\nProcessor time of a choice, fastest of {TIMED_ROUNDS} rounds, {ADAPTERS:,} adapters")
    print(_row("", "shards", "us", "a second"))
    for shards in TIMED_SHARDS:
        _print_choice("all shards open", shards, shards, kept=True)
        _print_choice("one is not", shards, shards - 1, kept=True)
        _print_choice("adapter not seen before", shards, shards, kept=False)


def _print_spread(case: Case, seeds: Sequence[int]) -> None:
    with ExitStack() as stack:
        for name, value in case.constants.items():
            module = replication if hasattr(replication, name) else ring
            stack.enter_context(patch.object(module, name, value))
        spreads = [Simulation(seed, case.in_flight, case.workers).run() for seed in seeds]
    worst = max(spread.worst for spread in spreads)
    planned = statistics.fmean(spread.planned for spread in spreads)
    cells = (
        f"{case.in_flight}",
        f"{case.workers}",
        f"{statistics.fmean(spread.copies for spread in spreads):.1f}",
        f"{statistics.fmean(spread.average for spread in spreads):.2f}",
        f"{worst:.2f}",
        f"{planned:.1%}",
        f"{min(spread.planned for spread in spreads):.1%}",
    )
    verdicts = ""
    if case.has_targets:
        # Several workers, that know nothing of each other, may round up to one more each.
        rounding = case.workers if case.workers > 1 else 0
        most = TARGET_MAX_OVER_MEAN + rounding * SHARDS / case.in_flight
        verdicts = (
            f"   worst at most {most:.2f}: {_verdict(most - worst, '.2f')}; "
            f"planned at least {TARGET_PLANNED:.0%}: {_verdict(planned - TARGET_PLANNED, '.1%')}"
        )
    print(_row(case.name, *cells) + verdicts, flush=True)


def _print_moves(seeds: Sequence[int]) -> None:
    share = 1 / (SHARDS + 1)
    most = share + SIGMAS * math.sqrt(share * (1 - share) / ADAPTERS)
    moves = [added(seed) for seed in seeds]
    worst, strays = max(move.share for move in moves), sum(move.strays for move in moves)
    print(
        _moves_row("a shard is added", moves)
        + f"   at most {most:.1%}, all to the new one: "
        + ("met" if worst <= most and not strays else "missed")
    )
    moves = [removed(seed) for seed in seeds]
    strays = sum(move.strays for move in moves)
    print(
        _moves_row("a shard is removed", moves)
        + f"   exactly its own: {'missed' if strays else 'met'}"
    )


def _moves_row(name: str, moves: Sequence[Moves]) -> str:
    return _row(
        name,
        f"{statistics.fmean(move.share for move in moves):.1%}",
        f"{max(move.share for move in moves):.1%}",
        f"{sum(move.strays for move in moves)}",
    )


def _print_choice(name: str, shards: int, open_shards: int, *, kept: bool) -> None:
    us = choice_us(shards, open_shards, kept=kept)
    verdict = ""
    if kept:
        verdict = f"   at most {TARGET_CHOICE_US:g} us: {_verdict(TARGET_CHOICE_US - us, '.1f')}"
    print(_row(name, f"{shards}", f"{us:.1f}", f"{1e6 / us:,.0f}") + verdict)


def _row(name: str, *cells: str) -> str:
    return f"  {name:<26}" + "".join(f"{cell:>11}" for cell in cells)


def _verdict(margin: float, form: str) -> str:
    return "met" if margin >= 0 else f"missed by {-margin:{form}}"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.ring", description=__doc__)
    parser.add_argument("--seeds", type=int, default=8, help="simulated runs of each line")
    return parser.parse_args()


if __name__ == "__main__":
    main()
