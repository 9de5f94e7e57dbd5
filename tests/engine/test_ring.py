"""Every process places alike, few adapters move, and no shard is above the cap without need."""

from __future__ import annotations

import math
import pickle
import random
import statistics
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from engine.errors import ShardUnavailable
from engine.ring import (
    CAP,
    CAP_OF_FEW,
    FEW_IN_FLIGHT,
    LEAST_CAP,
    AdapterKey,
    Choice,
    NoShardOpen,
    Plan,
    Reason,
    Ring,
    ShardState,
    cap,
)

UP, DRAINING, DOWN = ShardState.UP, ShardState.DRAINING, ShardState.DOWN
KEYS = [AdapterKey("acme", f"adapter-{number}") for number in range(8_000)]
SIGMAS = 3.0
"""The keys are fixed, so a test that passes once passes always."""

UNHURRIED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
"""The machine may be busy."""

letters = st.text("abcdefghij-0123456789", min_size=1, max_size=12)
keys = st.builds(AdapterKey, letters, letters)
shards = st.lists(letters, min_size=1, max_size=10, unique=True)
loads_of_one = st.one_of(st.integers(0, 8), st.integers(0, 300))


def names(count: int) -> list[str]:
    return [f"shard-{number}" for number in range(count)]


def ring_of(shards: Sequence[str], plan: Plan | None = None) -> Ring:
    """A ring of shards that are all up."""
    return Ring(dict.fromkeys(shards, UP), plan or Plan())


def copies(key: AdapterKey, count: int) -> Plan:
    """A plan for this one adapter."""
    return Plan(((key, count),))


class Situation:
    """A ring in any state, an adapter with any number of replicas, and any load."""

    def __init__(self, draw: st.DrawFn) -> None:
        self.key = draw(keys)
        self.states = {name: draw(st.sampled_from(ShardState)) for name in draw(shards)}
        self.planned = draw(st.integers(1, len(self.states)))
        self.ring = Ring(self.states, copies(self.key, self.planned))
        self.loads = {name: draw(loads_of_one) for name in self.states}
        self.open = {name for name, state in self.states.items() if state is UP}


situations = st.composite(Situation)()


# --- the order of shards ----------------------------------------------------


@UNHURRIED
@given(keys, shards, st.randoms(use_true_random=False))
def test_the_order_in_which_shards_are_listed_does_not_matter(
    key: AdapterKey, listed: list[str], shuffler: random.Random
) -> None:
    shuffled = list(listed)
    shuffler.shuffle(shuffled)
    ranked = ring_of(listed).ranked(key)
    assert ring_of(shuffled).ranked(key) == ranked
    assert sorted(ranked) == sorted(listed)


@UNHURRIED
@given(keys, shards, letters)
def test_a_shard_that_comes_or_goes_leaves_the_others_in_their_order(
    key: AdapterKey, listed: list[str], name: str
) -> None:
    assume(name not in listed)
    ranked = ring_of([*listed, name]).ranked(key)
    assert tuple(each for each in ranked if each != name) == ring_of(listed).ranked(key)


@pytest.mark.parametrize("count", [1, 2, 4, 8, 16])
def test_a_shard_that_comes_takes_its_share_and_nothing_else_moves(count: int) -> None:
    before, after = ring_of(names(count)), ring_of(names(count + 1))
    moved = [key for key in KEYS if before.ranked(key)[0] != after.ranked(key)[0]]
    assert {after.ranked(key)[0] for key in moved} == {f"shard-{count}"}
    share = 1 / (count + 1)
    deviation = math.sqrt(share * (1 - share) / len(KEYS))
    assert abs(len(moved) / len(KEYS) - share) <= SIGMAS * deviation


@pytest.mark.parametrize("state", [DRAINING, DOWN])
def test_a_shard_that_goes_gives_up_exactly_its_own(state: ShardState) -> None:
    before = ring_of(names(8))
    for gone in before.shards:
        after = before.with_state(gone, state)
        for key in KEYS[:1_000]:
            ranked = before.ranked(key)
            heir = ranked[1] if ranked[0] == gone else ranked[0]
            assert after.replicas(key) == (heir,)


def test_what_a_shard_gave_up_is_shared_evenly_by_the_others() -> None:
    ring = ring_of(names(5))
    orphans = [key for key in KEYS if ring.ranked(key)[0] == "shard-2"]
    heirs = Counter(ring.ranked(key)[1] for key in orphans)
    even = len(orphans) / 4
    assert max(abs(count - even) for count in heirs.values()) <= SIGMAS * math.sqrt(even * 3 / 4)


@pytest.mark.parametrize(
    ("count", "average", "worst"), [(4, 1.06, 1.11), (8, 1.14, 1.22), (16, 1.24, 1.34)]
)
def test_adapters_are_spread_evenly(count: int, average: float, worst: float) -> None:
    """As by throwing dice, which no hash can better: the figures are from a simulation."""
    ring = ring_of(names(count))
    peaks = []
    for number in range(12):
        homes = Counter(ring.ranked(AdapterKey(f"{number}", f"{n}"))[0] for n in range(1_000))
        peaks.append(max(homes.values()) / (1_000 / count))
    assert statistics.fmean(peaks) <= average + 0.02
    assert max(peaks) <= worst + 0.05


def test_tenants_have_orders_of_their_own() -> None:
    ring = ring_of(names(8))
    same = sum(ring.ranked(key)[0] == ring.ranked(key._replace(tenant="b"))[0] for key in KEYS)
    assert abs(same - len(KEYS) / 8) <= SIGMAS * math.sqrt(len(KEYS) * 7 / 64)


def placed(count: int) -> str:
    """Where so many adapters go, one after the other, and why."""
    ring = ring_of(names(5), copies(KEYS[0], 3)).with_state("shard-3", DOWN)
    loads = dict.fromkeys(ring.shards, 0)
    said = []
    for key in KEYS[:count]:
        choice = ring.choose(key, loads)
        loads[choice.shard] += 1
        said.append(f"{choice.shard}:{choice.reason.value}")
    return " ".join(said)


def placed_elsewhere(count: int, hash_seed: str) -> str:
    """The same in a process whose own `hash` is seeded otherwise."""
    program = f"from tests.engine.test_ring import placed; print(placed({count}))"
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parents[2],
        env={"PYTHONHASHSEED": hash_seed},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    return done.stdout.strip()


def test_every_process_places_alike() -> None:
    """Workers, and the same worker after a restart, must agree."""
    assert placed_elsewhere(200, "1") == placed_elsewhere(200, "2") == placed(200)


def test_orders_are_those_of_earlier_releases() -> None:
    """Adapters would be loaded anew after an upgrade, and by workers one by one, if not."""
    ring = ring_of(names(5))
    orders = "".join(name[-1] for key in KEYS[:8] for name in ring.ranked(key))
    assert orders == "4213041023021341423024130104321302440123"


# --- the choice -------------------------------------------------------------


@UNHURRIED
@given(situations)
def test_a_choice_says_all_that_decided_it(at: Situation) -> None:
    assume(at.open)
    choice = at.ring.choose(at.key, at.loads)
    assert choice.ranked == at.ring.ranked(at.key)
    assert choice.candidates == tuple(name for name in choice.ranked if name in at.open)
    assert choice.loads == tuple(at.loads[name] for name in choice.candidates)
    assert choice.replicas == at.planned
    assert choice.cap == cap(sum(choice.loads), len(at.open))
    check_explanation(choice)


def check_explanation(choice: Choice) -> None:
    """That what it says leads to the shard that it names, by the rules as they are written."""
    loads = dict(zip(choice.candidates, choice.loads, strict=True))
    own, others = choice.candidates[: choice.replicas], choice.candidates[choice.replicas :]
    if min(loads[name] for name in own) < choice.cap:
        assert choice.shard in own
        assert all(loads[choice.shard] <= loads[name] for name in own)
        earlier = own[: own.index(choice.shard)]
        assert all(loads[name] > loads[choice.shard] for name in earlier)
        is_planned = choice.shard in choice.ranked[: choice.replicas]
        assert choice.reason is (Reason.PLANNED if is_planned else Reason.FAILOVER)
    else:
        earlier = others[: others.index(choice.shard)]
        assert all(loads[name] >= choice.cap for name in earlier)
        assert choice.reason is Reason.OVERFLOW


@UNHURRIED
@given(situations)
def test_no_shard_gets_above_the_cap_while_another_is_below(at: Situation) -> None:
    assume(at.open)
    assert any(
        at.loads[name] < cap(sum(at.loads[n] for n in at.open), len(at.open)) for name in at.open
    )
    for key in (at.key, None):
        choice = at.ring.choose(key, at.loads)
        assert at.loads[choice.shard] + 1 <= choice.cap


@UNHURRIED
@given(situations)
def test_only_open_shards_are_chosen_and_without_one_it_says_so(at: Situation) -> None:
    for key in (at.key, None):
        if at.open:
            assert at.ring.choose(key, at.loads).shard in at.open
        else:
            with pytest.raises(NoShardOpen, match="retry") as raised:
                at.ring.choose(key, at.loads)
            assert isinstance(raised.value, ShardUnavailable)
            assert raised.value.shard in at.states


@UNHURRIED
@given(situations)
def test_failover_walks_through_every_open_shard_in_order(at: Situation) -> None:
    tried: list[str] = []
    idle = dict.fromkeys(at.states, 0)
    while len(tried) < len(at.open):
        choice = at.ring.choose(at.key, idle, without=tried)
        assert choice.candidates[0] == choice.shard, "all are idle, so it is the first"
        tried.append(choice.shard)
    assert tuple(tried) == at.ring.candidates(at.key)
    with pytest.raises(NoShardOpen):
        at.ring.choose(at.key, idle, without=tried)


@UNHURRIED
@given(situations)
def test_the_base_model_goes_to_the_least_loaded_shard(at: Situation) -> None:
    assume(at.open)
    choice = at.ring.choose(None, at.loads)
    assert choice.reason is Reason.LEAST_LOADED
    assert at.loads[choice.shard] == min(at.loads[name] for name in at.open)
    assert choice.ranked == tuple(sorted(at.states))
    assert choice.replicas == 0
    assert choice.cap == cap(sum(choice.loads), len(at.open))


@UNHURRIED
@given(situations)
def test_more_replicas_hold_all_that_fewer_held(at: Situation) -> None:
    assert at.ring.with_plan(Plan()).replicas(at.key) == at.ring.candidates(at.key)[:1]
    held: tuple[str, ...] = ()
    for count in range(1, len(at.states) + 1):
        replicas = at.ring.with_plan(copies(at.key, count)).replicas(at.key)
        assert replicas[: len(held)] == held
        assert len(replicas) == min(count, len(at.open))
        held = replicas


@UNHURRIED
@given(keys, shards)
def test_requests_stay_at_home_until_it_is_full(key: AdapterKey, listed: list[str]) -> None:
    ring = ring_of(listed)
    loads = dict.fromkeys(listed, 0)
    for _ in range(LEAST_CAP):
        choice = ring.choose(key, loads)
        assert (choice.shard, choice.reason) == (ring.ranked(key)[0], Reason.PLANNED)
        loads[choice.shard] += 1
    assert len(listed) < 4 or ring.choose(key, loads).shard == ring.ranked(key)[1]


def test_a_load_on_a_shard_that_drains_does_not_raise_the_cap_of_the_others() -> None:
    ring = ring_of(names(3)).with_state("shard-0", DRAINING)
    choice = ring.choose(None, {"shard-0": 300, "shard-1": 10, "shard-2": 11})
    assert (choice.shard, choice.cap) == ("shard-1", cap(21, 2))


def test_a_replica_that_is_open_is_planned_also_while_another_is_not() -> None:
    key = KEYS[0]
    ring = ring_of(names(4), copies(key, 2))
    first, second, third, _ = ring.ranked(key)
    ring = ring.with_state(first, DOWN)
    idle = dict.fromkeys(names(4), 0)
    assert ring.choose(key, idle)[:2] == (second, Reason.PLANNED)
    assert ring.choose(key, {**idle, second: 1})[:2] == (third, Reason.FAILOVER)


# --- the cap ----------------------------------------------------------------


@UNHURRIED
@given(st.integers(0, 5_000), st.integers(1, 64))
def test_the_cap_leaves_room_and_never_falls_while_requests_come(
    in_flight: int, count: int
) -> None:
    most = cap(in_flight, count)
    assert most * count > in_flight, "or all could be at it"
    assert most <= cap(in_flight + 1, count)
    assert most >= max(LEAST_CAP, CAP * (in_flight + 1) / count)
    assert most <= max(LEAST_CAP, CAP_OF_FEW * (in_flight + 1) / count + 1)


def test_the_cap_is_the_even_share_and_a_little_more() -> None:
    assert [cap(in_flight - 1, 8) for in_flight in (1, 21, 24, 64)] == [LEAST_CAP, 4, 5, 12]
    assert cap(FEW_IN_FLIGHT - 1, 8) == cap(FEW_IN_FLIGHT, 8) == cap(120, 8) == 19
    assert [cap(in_flight - 1, 8) for in_flight in (128, 256, 512)] == [20, 40, 80]


@pytest.mark.parametrize("workers", [1, 2, 4, 8])
@pytest.mark.parametrize("count", [2, 8, 16])
def test_workers_that_bound_their_own_requests_bound_the_sum(workers: int, count: int) -> None:
    """Below CAP times the mean and one request for each worker, whatever they are asked for."""
    ring = ring_of(names(count))
    generator = random.Random(workers * count)
    own = [dict.fromkeys(ring.shards, 0) for _ in range(workers)]
    total = Counter[str]()
    popular = KEYS[:3]  # all but a few requests would go to three shards
    for _ in range(300 * workers):
        loads = generator.choice(own)
        shard = ring.choose(generator.choice(popular), loads).shard
        loads[shard] += 1
        total[shard] += 1
    mean = total.total() / count
    assert max(total.values()) < CAP * mean + workers
    assert min(total.values()) > 0


@UNHURRIED
@given(st.data())
def test_the_bound_holds_while_requests_come_and_go(data: st.DataObject) -> None:
    ring = ring_of(names(data.draw(st.integers(1, 6))))
    loads = dict.fromkeys(ring.shards, 0)
    running: list[str] = []
    generator = data.draw(st.randoms(use_true_random=False))
    for _ in range(60):
        if running and generator.random() < 0.3:
            loads[running.pop(generator.randrange(len(running)))] -= 1
            continue
        choice = ring.choose(generator.choice(KEYS[:4]), loads)
        loads[choice.shard] += 1
        running.append(choice.shard)
        assert loads[choice.shard] <= choice.cap
        check_explanation(choice)


# --- rings and plans as values ----------------------------------------------


def test_a_ring_needs_a_shard_and_knows_only_its_own() -> None:
    with pytest.raises(ValueError, match="needs a shard"):
        Ring({})
    with pytest.raises(KeyError, match="shard-9"):
        ring_of(names(2)).with_state("shard-9", DOWN)


def test_a_change_makes_another_ring() -> None:
    ring = ring_of(["b", "a"])
    drained = ring.with_state("a", DRAINING)
    planned = drained.with_plan(copies(KEYS[0], 2))
    assert ring.states == {"a": UP, "b": UP} and ring.plan == Plan()
    assert drained.states == {"a": DRAINING, "b": UP} and drained.plan == Plan()
    assert planned.states == drained.states and planned.plan == copies(KEYS[0], 2)
    assert ring.shards == drained.shards == planned.shards == ("a", "b")
    assert drained.with_state("a", UP).candidates(KEYS[0]) == ring.ranked(KEYS[0])


def test_a_plan_goes_to_other_processes() -> None:
    plan = Plan(tuple((key, 3) for key in KEYS[:31]), revision=7)
    sent = pickle.dumps(plan)
    assert pickle.loads(sent) == plan
    assert hash(pickle.loads(sent)) == hash(plan)
    assert len(sent) < 2_048
