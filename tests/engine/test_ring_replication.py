"""Copies are planned at once, kept for a while, and never given up under a request."""

from __future__ import annotations

import math
import random
from collections import Counter

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.replication import (
    ALPHA,
    MIN_TOKENS,
    SHRINK_AFTER_S,
    WINDOW_S,
    Planner,
    Shares,
    replicas_for,
)
from engine.ring import AdapterKey, Plan, Ring, ShardState

KEYS = [AdapterKey("acme", f"adapter-{number}") for number in range(200)]
HOT, WARM = KEYS[:2]
PLENTY = 1_000
"""Places on a shard, where they are not the matter."""
MANY_TOKENS = 20 * MIN_TOKENS

UNHURRIED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
"""The machine may be busy."""


def ring_of(count: int) -> Ring:
    return Ring({f"shard-{number}": ShardState.UP for number in range(count)})


class Host:
    """A planner with a clock to turn, shares to set, and requests to hold."""

    def __init__(self, shards: int = 8, places: int = PLENTY) -> None:
        self.now_s = 1_000.0
        self.ring = ring_of(shards)
        self.planner = Planner(places, lambda: self.now_s)
        self.running: Counter[tuple[AdapterKey, str]] = Counter()
        self.asked: set[tuple[AdapterKey, str]] = set()

    def plan(self) -> dict[AdapterKey, int]:
        """Replicas as they are planned now."""
        plan = self.planner.plan(self.ring, self._in_flight)
        self.ring = self.ring.with_plan(plan)
        return dict(plan.replicas)

    def _in_flight(self, key: AdapterKey, shard: str) -> bool:
        self.asked.add((key, shard))
        return self.running[key, shard] > 0

    def share(self, **percent: float) -> None:
        """From now on these adapters have these shares, and the base model has the rest."""
        self.now_s += 100 * WINDOW_S  # what was before is forgotten
        rest = 100.0 - sum(percent.values())
        self.planner.record(None, round(rest / 100 * MANY_TOKENS))
        for adapter, each in percent.items():
            self.planner.record(AdapterKey("acme", adapter), round(each / 100 * MANY_TOKENS))


def named(adapter: str) -> AdapterKey:
    return AdapterKey("acme", adapter)


# --- how many ---------------------------------------------------------------


@UNHURRIED
@given(st.floats(0, 1), st.integers(1, 64))
def test_replicas_are_a_multiple_of_the_share_between_one_and_all(share: float, count: int) -> None:
    replicas = replicas_for(share, count)
    assert 1 <= replicas <= count
    assert replicas == count or share <= replicas / (ALPHA * count)
    assert replicas == 1 or (replicas - 1) / (ALPHA * count) <= share


@UNHURRIED
@given(st.floats(0, 1), st.floats(0, 1), st.integers(1, 64))
def test_replicas_do_not_fall_with_the_share(one: float, other: float, count: int) -> None:
    low, high = sorted((one, other))
    assert replicas_for(low, count) <= replicas_for(high, count)


@UNHURRIED
@given(st.lists(st.integers(0, 100_000), min_size=1, max_size=60), st.integers(1, 16))
def test_who_has_more_tokens_has_no_fewer_replicas(tokens: list[int], count: int) -> None:
    host = Host(count)
    for key, each in zip(KEYS, tokens, strict=False):
        host.planner.record(key, each)
    planned = host.plan()
    by_tokens = sorted(zip(tokens, KEYS, strict=False))
    counts = [planned.get(key, 1) for _, key in by_tokens]
    assert counts == sorted(counts)
    assert len(planned) < ALPHA * count, "the plan is small"
    assert min(planned.values(), default=2) > 1


def test_zipfs_law_makes_four_of_a_thousand_hot() -> None:
    host = Host()
    for rank in range(1, 1_001):
        host.planner.record(named(f"{rank}"), 10_000_000 // rank)
    assert host.plan() == {named("1"): 5, named("2"): 3, named("3"): 2, named("4"): 2}


def test_one_shard_has_no_replicas() -> None:
    host = Host(shards=1)
    host.share(hot=100)
    assert host.plan() == {}


def test_few_tokens_say_nothing_of_what_is_hot() -> None:
    host = Host()
    host.planner.record(HOT, 512)
    assert host.plan() == {}
    host.planner.record(HOT, MIN_TOKENS // 8)
    assert host.plan() == {HOT: 5}


def test_tokens_of_the_base_model_are_load_too() -> None:
    host = Host()
    host.share(hot=10)
    assert host.plan() == {named("hot"): 4}


# --- shares -----------------------------------------------------------------

events = st.lists(
    st.tuples(st.sampled_from(KEYS[:5]), st.integers(0, 500_000), st.floats(0, 2 * WINDOW_S)),
    max_size=30,
)


@UNHURRIED
@given(events, st.floats(0, WINDOW_S), st.randoms(use_true_random=False))
def test_shares_are_those_of_tokens_weighted_by_age(
    events: list[tuple[AdapterKey, int, float]], idle_s: float, asker: random.Random
) -> None:
    now_s = 0.0
    shares = Shares(lambda: now_s)
    recorded = []
    for key, tokens, pause_s in events:
        now_s += pause_s
        shares.record(key, tokens)
        recorded.append((key, tokens, now_s))
        if asker.random() < 0.3:
            shares.above(0.0)  # to look changes nothing
    now_s += idle_s
    weighted = dict.fromkeys(KEYS[:5], 0.0)
    for key, tokens, time_s in recorded:
        weighted[key] += tokens * math.exp((time_s - now_s) / WINDOW_S)
    total = max(MIN_TOKENS, sum(weighted.values()))
    found = shares.above(0.0)
    for key in KEYS[:5]:
        assert found.get(key, 0.0) == pytest.approx(weighted[key] / total, abs=1e-4)
    assert list(found.values()) == sorted(found.values(), reverse=True)


def test_adapters_that_nobody_asks_for_are_forgotten() -> None:
    now_s = 0.0
    shares = Shares(lambda: now_s)
    for key in KEYS:
        shares.record(key, 1_000)
    assert len(shares.above(0.0)) == len(KEYS)
    now_s += 8 * WINDOW_S
    assert shares.above(0.0) == {}


def test_a_clock_that_stands_at_any_hour_is_as_good() -> None:
    now_s = 1e9
    shares = Shares(lambda: now_s)
    shares.record(HOT, MANY_TOKENS)
    now_s += 1e7  # nobody looked for months
    shares.record(WARM, MANY_TOKENS)
    assert shares.above(0.0) == {WARM: 1.0}


# --- growing and shrinking --------------------------------------------------


def test_a_plan_grows_at_once_and_is_the_same_while_nothing_changes() -> None:
    host = Host()
    assert host.plan() == {}
    assert host.ring.plan.revision == 0
    host.share(hot=13, warm=5)
    assert host.plan() == {named("hot"): 5, named("warm"): 2}
    first = host.ring.plan
    assert first.revision == 1
    host.now_s += 1
    assert host.plan() and host.ring.plan is first
    host.share(hot=20, warm=5)
    assert host.plan() == {named("hot"): 7, named("warm"): 2}
    assert host.ring.plan.revision == 2


def test_a_copy_is_kept_until_it_was_not_wanted_for_a_while() -> None:
    host = Host()
    host.share(hot=13)
    assert host.plan() == {named("hot"): 5}
    last_s = host.now_s
    host.planner.record(None, 1_000 * MANY_TOKENS)
    for after_s in (1.0, SHRINK_AFTER_S / 2, SHRINK_AFTER_S - 1):
        host.now_s = last_s + after_s
        assert host.plan() == {named("hot"): 5}
    host.now_s = last_s + SHRINK_AFTER_S
    assert host.plan() == {}
    assert host.ring.plan == Plan(revision=2)


def test_as_many_copies_are_kept_as_were_wanted_meanwhile() -> None:
    host = Host()
    key = named("hot")
    host.share(hot=13)
    begin_s = host.now_s
    planned = {}
    for after_s, tokens, others in [
        (0, 0, 0),
        (600, MANY_TOKENS, 13 * MANY_TOKENS),
        (601, 0, 1_000 * MANY_TOKENS),
        *((after_s, 0, 0) for after_s in (899, 900, 1_499, 1_500)),
    ]:
        host.now_s = begin_s + after_s
        host.planner.record(key, tokens)
        host.planner.record(None, others)
        planned[after_s] = host.plan().get(key, 1)
    assert planned == {0: 5, 600: 5, 601: 5, 899: 5, 900: 3, 1_499: 3, 1_500: 1}


def test_a_copy_with_requests_is_kept_and_those_before_it_too() -> None:
    host = Host()
    key = named("hot")
    host.share(hot=13)
    assert host.plan() == {key: 5}
    ranked = host.ring.ranked(key)
    host.running[key, ranked[2]] = 1
    host.share(hot=1)
    assert host.plan() == {key: 3}, "the fourth and the fifth are idle"
    assert host.asked == {(key, shard) for shard in ranked[2:5]}
    host.now_s += 10
    assert host.plan() == {key: 3}
    host.running.clear()
    assert host.plan() == {}


def test_the_copy_that_goes_is_the_last_of_the_open_shards() -> None:
    host = Host(shards=4)
    key = named("hot")
    host.share(hot=10)
    assert host.plan() == {key: 2}
    first, second, third, _ = host.ring.ranked(key)
    host.ring = host.ring.with_state(first, ShardState.DOWN)
    assert host.ring.replicas(key) == (second, third)
    host.share(hot=1)
    for busy in (second, third):
        host.running[key, busy] = 1
        assert host.plan() == {key: 2}, "a copy now, or once the first is back"
        host.running.clear()
    assert host.plan() == {}


def test_a_ring_with_fewer_shards_has_fewer_replicas() -> None:
    host = Host(shards=8)
    host.share(hot=90)
    assert host.plan() == {named("hot"): 8}
    host.ring = ring_of(3)
    assert host.plan() == {named("hot"): 3}


# --- places -----------------------------------------------------------------


def on_each(host: Host, planned: dict[AdapterKey, int]) -> Counter[str]:
    """Hot adapters on each shard."""
    return Counter(
        shard for key, count in planned.items() for shard in host.ring.ranked(key)[:count]
    )


def test_the_hottest_come_first_for_the_places() -> None:
    host = Host(shards=4, places=1)
    host.share(a=13, b=12.9, c=12.8, d=12.7, e=12.6)
    planned = host.plan()
    assert planned[named("a")] == 3
    assert max(on_each(host, planned).values()) == 1
    assert len(planned) == 1, "no two of the other shards are left"


def test_a_place_that_is_given_up_is_taken() -> None:
    host = Host(shards=2, places=1)
    host.share(old=90, new=9)
    assert host.plan() == {named("old"): 2}
    host.share(old=1, new=90)
    host.running[named("old"), host.ring.ranked(named("old"))[1]] = 1
    assert host.plan() == {named("old"): 2}, "who has a copy keeps it"
    host.running.clear()
    assert host.plan() == {named("new"): 2}


@settings(UNHURRIED, max_examples=40)
@given(st.integers(1, 8), st.integers(1, 6), st.randoms(use_true_random=False))
def test_a_life_of_plans_keeps_the_rules(count: int, places: int, chance: random.Random) -> None:
    """Never too many on a shard, never fewer than lately wanted, never gone under a request."""
    host = Host(count, places)
    some = KEYS[:8]
    wishes: dict[AdapterKey, list[tuple[float, int]]] = {key: [] for key in some}
    before: dict[AdapterKey, int] = {}
    for _ in range(20):
        host.now_s += chance.choice((1.0, 100.0, 400.0, 1_000.0))
        for key in chance.sample(some, 3):
            host.planner.record(key, chance.randrange(300_000))
        host.running = Counter(
            {(key, f"shard-{chance.randrange(count)}"): 1 for key in chance.sample(some, 4)}
        )
        shares = host.planner.shares()
        planned = host.plan()
        for key in some:
            now, was = planned.get(key, 1), before.get(key, 1)
            wish = replicas_for(shares.get(key, 0.0), count)
            wishes[key].append((host.now_s, wish))
            assert now <= max(was, wish), "nothing grows unless it is wanted"
            if now < was:
                assert not any(host.running[key, s] for s in host.ring.ranked(key)[now:was])
                lately_s = host.now_s - SHRINK_AFTER_S
                assert now >= max(each for time_s, each in wishes[key] if time_s > lately_s)
        assert max(on_each(host, planned).values(), default=0) <= places
        before = planned
