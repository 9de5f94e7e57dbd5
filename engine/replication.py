"""Replication: how many shards each hot adapter is held on, planned from its share of the tokens.

One process, the host, measures and plans; all others get the plan and choose by it. A copy is
planned as soon as it is wanted. It is given up after it was not wanted for SHRINK_AFTER_S, and
when nothing runs on it: a load stops a shard for everyone on it, while a copy that idles costs
one of many places.
"""

from __future__ import annotations

import math
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping

from engine.ring import AdapterKey, Plan, Ring

ALPHA = 4.0
"""Copies for each even share of a shard that an adapter takes up, so that no copy is more than a
quarter of a shard: as much as the ring's cap leaves above an even share. With 512 in flight and an
ALPHA of 1, 2, 4 and 8, 89.8, 94.1, 99.6 and 100 % of requests find a replica below the cap, for 1,
3, 9 and 25 copies in all (8 shards, 1,000 adapters, Zipf(1), by `tests/bench/ring.py`)."""
WINDOW_S = 300.0
"""Time constant of the moving average: tokens of that age count 1/e."""
MIN_TOKENS = 50_000
"""Of the moving sum, under which shares are of this much and not of what there is. It is 167 a
second, which one shard can do; and a single answer says nothing of what is hot."""
SHRINK_AFTER_S = 900.0

NEGLIGIBLE_TOKENS = 0.5
"""Of an adapter's moving sum: it is forgotten."""

OnShard = Callable[[AdapterKey, str], bool]
"""Whether any process has requests of an adapter in flight on a shard."""


def replicas_for(share: float, shards: int) -> int:
    """Copies of an adapter with this share of the tokens: clamp(ceil(ALPHA * N * share), 1, N)."""
    return max(1, min(shards, math.ceil(ALPHA * shards * share)))


class Shares:
    """Share of the tokens of each adapter: exponentially weighted, over WINDOW_S.

    Tokens that come later weigh more, and all are scaled down now and then; so none has to be
    touched for its age (forward decay: Cormode, Shkapenyuk, Srivastava and Xu, ICDE 2009).
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        """`clock` tells seconds, and never goes back."""
        self._clock = clock
        self._scaled_s = clock()
        self._tokens: dict[AdapterKey | None, float] = {}

    def record(self, key: AdapterKey | None, tokens: int) -> None:
        """Count tokens of an adapter; None is the base model."""
        age_s = self._clock() - self._scaled_s
        if age_s > WINDOW_S:
            self._scale()
            age_s = 0.0
        self._tokens[key] = self._tokens.get(key, 0.0) + tokens * math.exp(age_s / WINDOW_S)

    def above(self, least: float) -> dict[AdapterKey, float]:
        """Adapters with a share above `least`, largest first; equals in the order of names."""
        self._scale()
        total = max(MIN_TOKENS, math.fsum(self._tokens.values()))
        shares = {
            key: tokens / total
            for key, tokens in self._tokens.items()
            if key is not None and tokens > least * total
        }
        return dict(sorted(shares.items(), key=lambda item: (-item[1], item[0])))

    def _scale(self) -> None:
        """Let all that was counted age until now."""
        now_s = self._clock()
        factor = math.exp((self._scaled_s - now_s) / WINDOW_S)
        self._scaled_s = now_s
        aged = ((key, tokens * factor) for key, tokens in self._tokens.items())
        self._tokens = {key: tokens for key, tokens in aged if tokens >= NEGLIGIBLE_TOKENS}


class Planner:
    """Makes the plan. One process has it."""

    def __init__(self, max_cpu_loras: int, clock: Callable[[], float] = time.monotonic) -> None:
        """`max_cpu_loras` is how many adapters one shard can hold."""
        self._places = max_cpu_loras
        self._clock = clock
        self._shares = Shares(clock)
        self._wishes: dict[AdapterKey, _Wishes] = {}
        self._plan = Plan()

    def record(self, key: AdapterKey | None, tokens: int) -> None:
        """Count tokens of prompts and completions, as they come; None is the base model."""
        self._shares.record(key, tokens)

    def shares(self) -> dict[AdapterKey, float]:
        """Share of the tokens of each adapter that has any lately, largest first."""
        return self._shares.above(0.0)

    def plan(self, ring: Ring, in_flight: OnShard) -> Plan:
        """The plan from now on: the same object as before if nothing changed.

        To be called every few seconds; the copies of a new plan are loaded before others are told
        of it. It never has more than `max_cpu_loras` hot adapters on one shard: who has a copy
        keeps it, and the hottest come first for the places that are left. Adapters with one copy
        are not counted. There may be more of them than places, and then they share what is left,
        least recently used first out.
        """
        shards = len(ring.shards)
        shares = self._shares.above(1 / (ALPHA * shards))
        wanted = {key: replicas_for(share, shards) for key, share in shares.items()}
        counts = {key: min(count, shards) for key, count in self._plan.replicas}
        self._note(wanted, counts)
        self._shrink(counts, ring, in_flight)
        self._grow(counts, wanted, ring)
        replicas = tuple(sorted((key, count) for key, count in counts.items() if count > 1))
        if replicas != self._plan.replicas:
            self._plan = Plan(replicas, self._plan.revision + 1)
        return self._plan

    def _note(self, wanted: Mapping[AdapterKey, int], counts: Mapping[AdapterKey, int]) -> None:
        now_s = self._clock()
        kept = {key: self._wishes.get(key) or _Wishes() for key in wanted.keys() | counts.keys()}
        for key, wishes in kept.items():
            wishes.note(wanted.get(key, 1), now_s)
        self._wishes = kept

    def _shrink(self, counts: dict[AdapterKey, int], ring: Ring, in_flight: OnShard) -> None:
        for key, count in counts.items():
            least = self._wishes[key].most
            while count > least and not any(
                in_flight(key, shard) for shard in _last_copy(key, count, ring)
            ):
                count -= 1
            counts[key] = count

    def _grow(
        self, counts: dict[AdapterKey, int], wanted: Mapping[AdapterKey, int], ring: Ring
    ) -> None:
        held = Counter(
            shard
            for key, count in counts.items()
            if count > 1
            for shard in ring.ranked(key)[:count]
        )
        for key, most in wanted.items():
            ranked, count = ring.ranked(key), counts.get(key, 1)
            while count < most:
                # The first copy beside the only one makes that one count too.
                taken = ranked[count : count + 1] if count > 1 else ranked[:2]
                if any(held[shard] >= self._places for shard in taken):
                    break
                held.update(taken)
                count += 1
            counts[key] = count


def _last_copy(key: AdapterKey, count: int, ring: Ring) -> set[str]:
    """The shards of the last of `count` replicas: as things stand, and with all shards open."""
    last = slice(count - 1, count)
    return {*ring.ranked(key)[last], *ring.candidates(key)[last]}


class _Wishes:
    """The most replicas that were wanted within SHRINK_AFTER_S."""

    __slots__ = ("_noted",)

    def __init__(self) -> None:
        # Ever fewer, ever later; what was followed by as many or more cannot matter again.
        self._noted: deque[tuple[int, float]] = deque()

    def note(self, wanted: int, now_s: float) -> None:
        """So many are wanted now."""
        while self._noted and self._noted[-1][0] <= wanted:
            self._noted.pop()
        self._noted.append((wanted, now_s))
        while now_s - self._noted[0][1] >= SHRINK_AFTER_S:
            self._noted.popleft()

    @property
    def most(self) -> int:
        """The most of them."""
        return self._noted[0][0]
