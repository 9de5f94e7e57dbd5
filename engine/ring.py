"""The ring: which shards hold an adapter, and which of them takes a request.

Each shard draws a score from the adapter's name, and the order of the scores is the adapter's own
order of shards: rendezvous hashing (Thaler and Ravishankar, IEEE/ACM Transactions on Networking
6(1), 1998). A shard that comes takes keys from all others evenly, and one that goes gives up its
own and no other; whoever knows the names of the shards knows the order. The hash is xxh3 and not
Python's own, because all workers, and the same worker after a restart, must decide alike.

Even shares of adapters are not even shares of load, since few adapters get most requests. Two
things make up for it. The plan gives hot adapters several replicas (`engine/replication.py`), of
which a request takes the least loaded. And no shard goes above a cap, a little more than its even
share of what is in flight (consistent hashing with bounded loads: Mirrokni, Thorup and
Zadimoghaddam, SODA 2018): a request that finds all replicas at the cap walks on in the adapter's
order.

A worker knows what it has in flight itself, and that is enough. Of its m requests it puts at most
ceil(c * m / N) on one of N shards, which is below c * m / N + 1. Over P workers that is below c
times the mean load of a shard and P more. ADR 0009 has the figures, and what they leave out.
"""

from __future__ import annotations

import copy
import enum
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import xxhash

from engine.errors import EngineError, ShardUnavailable

CAP = 1.25
"""Most that a shard may have, over an even share of what is in flight. With 512 in flight 96.0 % of
requests would find one of their replicas below 1.10, 99.6 % find one below 1.25, and all would
below 1.50, with a shard 45 % above the mean at times. (These figures and those below: 8 shards,
1,000 adapters, Zipf(1), by `tests/bench/ring.py`.)"""
CAP_OF_FEW = 1.5
FEW_IN_FLIGHT = 100
"""With so few, chance alone often takes a shard a quarter above its share: with 64 in flight 89.2 %
of requests would find a replica below 1.25, and 97.9 % find one below 1.5."""
LEAST_CAP = 4
"""A shard may always have so many. By shares alone the second request on 8 shards could not join
the first: its adapter would be loaded elsewhere, which stops all that run there, to save a batch
of two. With 8 in flight 86.5 % of requests would find a replica so, and 99.8 % find one."""

RANKED_KEYS = 16_384
"""Adapters whose order is kept, those used last: 6 MB at 8 shards, 13 MB at 64. It takes
microseconds to find one again."""


class NoShardOpen(ShardUnavailable):
    """All shards are down, draining or ruled out by the caller."""

    def __init__(self, shard: str) -> None:
        """`shard` would have been the first."""
        EngineError.__init__(self, "no shard takes requests now; retry")
        self.shard = shard


class ShardLent(NoShardOpen):
    """The shards that could answer are lent to training."""

    def __init__(self, shard: str) -> None:
        EngineError.__init__(
            self, "no shard takes requests while their devices are lent to training; retry later"
        )
        self.shard = shard


class AdapterKey(NamedTuple):
    """Names an adapter, over all tenants. Its versions share their shards."""

    tenant: str
    adapter: str


class ShardState(enum.Enum):
    """Whether a shard takes requests."""

    UP = "up"
    DRAINING = "draining"
    """It takes none, and finishes what it has. Who says so has warmed elsewhere what it holds."""
    DOWN = "down"


class Reason(enum.Enum):
    """Why a shard was chosen; the values are a metric's label."""

    PLANNED = "planned"
    """It is the least loaded of the adapter's replicas."""
    FAILOVER = "failover"
    """So it is, but stands in for one that is not open."""
    OVERFLOW = "overflow"
    """All replicas were at the cap, and it is the next below it."""
    LEAST_LOADED = "least_loaded"
    """The base model is on all of them."""


class Choice(NamedTuple):
    """Where one request goes, and all that decided it."""

    shard: str
    reason: Reason
    ranked: tuple[str, ...]
    """All shards in the adapter's order, which is that of failover; by name for the base model."""
    candidates: tuple[str, ...]
    """Those of them that were open to the request, in the same order."""
    loads: tuple[int, ...]
    """What each candidate had in flight."""
    replicas: int
    """So many candidates, the first ones, are the adapter's own; 0 for the base model."""
    cap: int
    """Most that a candidate may have in flight, this request among it."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How many replicas hot adapters have; all others have one. Immutable.

    One process makes the plan and all get it, so that all choose among the same replicas. It is
    small, because only few adapters can have a share of the tokens that makes them hot.
    """

    replicas: tuple[tuple[AdapterKey, int], ...] = ()
    """Of each adapter with more than one, in the order of their names."""
    revision: int = 0
    """Counts the changes."""


NO_REPLICAS = Plan()


def cap(in_flight: int, shards: int) -> int:
    """Most that one of `shards` may have in flight when one more request comes to `in_flight`.

    It is the even share times CAP_OF_FEW up to FEW_IN_FLIGHT, and times CAP from a little above
    it on. It stands still in between, and so never falls while requests come: what is on a shard
    has not become too much by others. As all caps together are more than `in_flight`, at least
    one shard is below its own.
    """
    coming = in_flight + 1
    few = min(coming, FEW_IN_FLIGHT)
    return max(LEAST_CAP, math.ceil(max(CAP * coming, CAP_OF_FEW * few) / shards))


class Ring:
    """The shards, their states and the plan. Immutable: a change makes another ring."""

    __slots__ = ("_candidates", "_open", "_plan", "_ranked", "_replicas", "_shards", "_states")

    def __init__(self, states: Mapping[str, ShardState], plan: Plan = NO_REPLICAS) -> None:
        """`states` by name of the shard, in any order. Raises ValueError if there is none."""
        if not states:
            raise ValueError("a ring needs a shard")
        self._shards = tuple(sorted(states))
        self._ranked = _ranking(self._shards)
        self._set_states(states)
        self._set_plan(plan)

    def _set_states(self, states: Mapping[str, ShardState]) -> None:
        self._states = dict(states)
        self._open = tuple(name for name in self._shards if states[name] is ShardState.UP)
        everyone = self._open == self._shards
        self._candidates = self._ranked if everyone else _only(frozenset(self._open), self._ranked)

    def _set_plan(self, plan: Plan) -> None:
        self._plan = plan
        self._replicas = dict(plan.replicas)

    @property
    def shards(self) -> tuple[str, ...]:
        """Names of all shards, in their order."""
        return self._shards

    @property
    def states(self) -> Mapping[str, ShardState]:
        """State of each shard."""
        return dict(self._states)

    @property
    def plan(self) -> Plan:
        """The plan that is in force."""
        return self._plan

    def with_state(self, shard: str, state: ShardState) -> Ring:
        """The ring with one shard in another state. Raises KeyError for an unknown shard."""
        if shard not in self._states:
            raise KeyError(shard)
        ring = copy.copy(self)  # with the orders that were found
        ring._set_states({**self._states, shard: state})
        return ring

    def with_plan(self, plan: Plan) -> Ring:
        """The ring with another plan."""
        ring = copy.copy(self)
        ring._set_plan(plan)
        return ring

    def ranked(self, key: AdapterKey) -> tuple[str, ...]:
        """All shards, open or not, in the adapter's order."""
        return self._ranked(key)

    def candidates(self, key: AdapterKey) -> tuple[str, ...]:
        """The open shards, in the adapter's order."""
        return self._candidates(key)

    def replicas(self, key: AdapterKey) -> tuple[str, ...]:
        """The open shards on which the adapter should be resident, in its order.

        Of a ring that is about to be, it says what to warm: before a shard drains, what is on it
        is loaded on `ring.with_state(shard, ShardState.DRAINING).replicas(key)`.
        """
        return self._candidates(key)[: self._replicas.get(key, 1)]

    def choose(
        self, key: AdapterKey | None, loads: Mapping[str, int], without: Collection[str] = ()
    ) -> Choice:
        """The shard for one request; without a key it is for the base model.

        `loads` is what the caller has in flight, of every shard in the ring. `without` rules out
        shards that were tried. Raises NoShardOpen.
        """
        if key is None:
            ranked, candidates = self._shards, self._open
        else:
            ranked, candidates = self._ranked(key), self._candidates(key)
        if without:
            candidates = tuple(name for name in candidates if name not in without)
        if not candidates:
            raise NoShardOpen(ranked[0])
        counts = tuple([loads[name] for name in candidates])
        most = cap(sum(counts), len(candidates))
        if key is None:
            index, reason, replicas = counts.index(min(counts)), Reason.LEAST_LOADED, 0
        else:
            replicas = self._replicas.get(key, 1)
            lowest = min(counts[:replicas])
            index, reason = counts.index(lowest), Reason.PLANNED  # the first of equals
            if lowest >= most:
                index = next(i for i in range(replicas, len(counts)) if counts[i] < most)
                reason = Reason.OVERFLOW
            elif len(candidates) < len(ranked) and candidates[index] not in ranked[:replicas]:
                reason = Reason.FAILOVER
        return Choice(candidates[index], reason, ranked, candidates, counts, replicas, most)


Order = Callable[[AdapterKey], tuple[str, ...]]
"""Shards in the order of an adapter."""


def _ranking(shards: tuple[str, ...]) -> Order:
    seeds = [(name, xxhash.xxh3_64_intdigest(name.encode())) for name in shards]

    @lru_cache(RANKED_KEYS)
    def ranked(key: AdapterKey) -> tuple[str, ...]:
        hashed = f"{key.tenant}/{key.adapter}".encode()
        scores = [(xxhash.xxh3_64_intdigest(hashed, seed), name) for name, seed in seeds]
        return tuple([name for _, name in sorted(scores, reverse=True)])

    return ranked


def _only(some: frozenset[str], ranked: Order) -> Order:
    """The order of these shards alone."""

    @lru_cache(RANKED_KEYS)
    def ranked_only(key: AdapterKey) -> tuple[str, ...]:
        return tuple([name for name in ranked(key) if name in some])

    return ranked_only
