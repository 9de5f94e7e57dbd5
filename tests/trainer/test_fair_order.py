"""Jobs are given devices in a fair order, and none waits for ever, whatever comes after it."""

from __future__ import annotations

import heapq
import math
import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from store.device_use import HALF_LIFE_S, DeviceUse
from trainer.claim import MAX_PRIORITY, MIN_PRIORITY, Claim
from trainer.device_shares import ADVANCE_S, DeviceShares
from trainer.fair_order import AGEING_S, in_order

NOW_NS = 10**18
HOUR_S = 3600.0


def claim(
    uid: str, tenant: str = "a", priority: int = 0, *, made_s: float = 0.0, queued_s: float = 0.0
) -> Claim:
    """Of a job that was made and queued so many seconds before NOW_NS."""
    return Claim(
        uid, tenant, priority, NOW_NS - round(made_s * 1e9), NOW_NS - round(queued_s * 1e9)
    )


def shares(**had_s: float) -> DeviceShares:
    """Of tenants that had so many seconds until now."""
    told = DeviceShares()
    told.seed(DeviceUse(tenant, 0, used_s, NOW_NS) for tenant, used_s in had_s.items())
    return told


def order(claims: list[Claim], told: DeviceShares | None = None) -> list[str]:
    return [each.uid for each in in_order(claims, told or DeviceShares(), NOW_NS)]


def test_priority_goes_before_share_and_share_before_age() -> None:
    waiting = [
        claim("old", "much", made_s=9),
        claim("young", "little"),
        claim("high", "much", 1),
        claim("low", "new", -1, made_s=99),
    ]
    assert order(waiting, shares(much=100, little=99)) == ["high", "young", "old", "low"]


def test_of_one_tenant_the_oldest_is_next_also_where_it_came_back_last() -> None:
    waiting = [claim("c", made_s=1), claim("a", made_s=3, queued_s=0), claim("b", made_s=2)]
    assert order(waiting) == ["a", "b", "c"]


def test_tenants_that_had_the_same_take_turns() -> None:
    flood = [claim(f"a{number}", "a", made_s=9 - number) for number in range(4)]
    waiting = [*flood, claim("b0", "b"), claim("b1", "b"), claim("c0", "c")]
    told = order(waiting)
    assert sorted(told[:3]) == ["a0", "b0", "c0"] and sorted(told[3:5]) == ["a1", "b1"]
    assert told[5:] == ["a2", "a3"]


def test_what_is_held_counts_from_the_first_moment() -> None:
    told = shares(b=ADVANCE_S - 1)
    told.begin(claim("running", "a"), NOW_NS)
    assert order([claim("a1", "a", made_s=9), claim("b1", "b")], told) == ["b1", "a1"]
    told.begin(claim("other", "b"), NOW_NS)
    assert order([claim("a1", "a"), claim("b1", "b", made_s=9)], told) == ["a1", "b1"]


def test_a_priority_that_waits_is_as_good_as_a_higher_one_in_time() -> None:
    def told(waited_s: float, *, granted_s: float = math.inf) -> list[str]:
        lately = DeviceShares()
        if granted_s < math.inf:
            since_ns = NOW_NS - round(granted_s * 1e9)
            lately.seed([DeviceUse("c", 0, 0.0, 0, since_ns)])
        return order(
            [claim("low", "a", 0, queued_s=waited_s), claim("high", "b", 2, made_s=99)], lately
        )

    assert told(2 * AGEING_S - 1) == ["high", "low"]
    assert told(2 * AGEING_S) == ["low", "high"]
    assert told(9 * AGEING_S, granted_s=2 * AGEING_S - 1) == ["high", "low"], "one was given one"
    assert told(9 * AGEING_S, granted_s=2 * AGEING_S) == ["low", "high"]
    late = claim("high", "b", 2, queued_s=-9 * AGEING_S)
    assert order([claim("low"), late]) == ["high", "low"], "a clock was set back"


def test_a_priority_that_has_aged_goes_before_once() -> None:
    low = [claim(f"low{number}", queued_s=9 * AGEING_S, made_s=9 - number) for number in range(3)]
    high = [claim(f"high{number}", "b", 2, made_s=9 - number) for number in range(3)]
    given = DeviceShares()
    given.begin(claim("running", "b", 2), NOW_NS)
    for each in (low, high):  # as long as they wait, one of the higher ones was given one just now
        each[:] = [replace(one, queue_time_ns=low[0].queue_time_ns) for one in each]
    assert order([*low, *high], given)[0] == "low0"
    high = [replace(one, queue_time_ns=NOW_NS) for one in high]
    told = order([*low, *high])
    assert told == ["low0", "high0", "high1", "high2", "low1", "low2"]


@given(
    st.lists(
        st.tuples(
            st.sampled_from("abc"),
            st.integers(MIN_PRIORITY, MAX_PRIORITY),
            st.floats(0, 99 * HOUR_S),
            st.floats(0, 99 * HOUR_S),
        ),
        max_size=30,
    ),
    st.dictionaries(st.sampled_from("abc"), st.floats(0, 10 * HOUR_S)),
)
def test_each_is_in_it_once_and_it_is_the_same_however_they_came(
    asked: list[tuple[str, int, float, float]], had_s: dict[str, float]
) -> None:
    waiting = [
        claim(f"{number:02}", tenant, priority, made_s=made_s, queued_s=queued_s)
        for number, (tenant, priority, made_s, queued_s) in enumerate(asked)
    ]
    told = order(waiting, shares(**had_s))
    assert sorted(told) == [each.uid for each in waiting]
    assert order(waiting[::-1], shares(**had_s)) == told
    of = {each.uid: each for each in waiting}
    for tenant in "abc":
        for priority in range(MIN_PRIORITY, MAX_PRIORITY + 1):
            kind = (tenant, priority)
            ages = [
                of[uid].create_time_ns for uid in told if (of[uid].tenant, of[uid].priority) == kind
            ]
            assert ages == sorted(ages)


# --- nobody waits for ever ---------------------------------------------------


class Rush:
    """Devices that are never free, because there is always another job of each of these kinds."""

    def __init__(
        self,
        devices: int,
        rivals: list[tuple[str, int]],
        duration_s: Callable[[str], float],
        told: DeviceShares | None = None,
    ) -> None:
        """`rivals` are tenants and priorities of jobs without an end, which hold a device
        for `duration_s` of their tenant."""
        self.now_ns = NOW_NS
        self.shares = told or DeviceShares()
        self._duration_s = duration_s
        self._waiting: list[Claim] = []
        self._running: list[tuple[int, str, Claim]] = []
        self._free = devices
        self._made = 0
        self._rivals = rivals
        for tenant, priority in rivals:
            self.add(tenant, priority)

    def add(self, tenant: str, priority: int) -> Claim:
        self._made += 1
        made = Claim(f"{self._made:06}", tenant, priority, self.now_ns, self.now_ns)
        self._waiting.append(made)
        return made

    def grants(self) -> Iterator[Claim]:
        """Who is given a device, one after the other."""
        while True:
            while self._free:
                first = next(in_order(self._waiting, self.shares, self.now_ns))
                self._waiting.remove(first)
                if (first.tenant, first.priority) in self._rivals:
                    self.add(first.tenant, first.priority)
                self._free -= 1
                self.shares.begin(first, self.now_ns)
                ends_ns = self.now_ns + round(self._duration_s(first.tenant) * 1e9)
                heapq.heappush(self._running, (ends_ns, first.uid, first))
                yield first
            self.now_ns, _, ended = heapq.heappop(self._running)
            self.shares.end(ended.uid, self.now_ns)
            self._free += 1

    def wait_s(self, waiting: Claim, at_most_s: float) -> float:
        """How long that job waits for a device."""
        for granted in self.grants():
            waited_s = (self.now_ns - waiting.queue_time_ns) / 1e9
            if granted is waiting or waited_s > at_most_s:
                return waited_s
        raise AssertionError


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**30),
    priority=st.integers(MIN_PRIORITY, MAX_PRIORITY - 1),
    devices=st.integers(1, 3),
    longest_s=st.floats(120, 4 * HOUR_S),
    same_tenant=st.booleans(),
)
def test_a_low_priority_comes_after_its_time_whatever_rush_there_is(
    seed: int, priority: int, devices: int, longest_s: float, same_tenant: bool
) -> None:
    chance = random.Random(seed)
    others = [each for each in range(MIN_PRIORITY, MAX_PRIORITY + 1) if each != priority]
    others = chance.sample(others, chance.randint(1, len(others)))
    rivals = [(chance.choice("ab"), each) for each in {MAX_PRIORITY, *others}]
    rush = Rush(devices, rivals, lambda tenant: chance.uniform(60, longest_s))
    victim = rush.add("a" if same_tenant else "v", priority)
    most_s = AGEING_S * (MAX_PRIORITY - priority) + (len(rivals) + 1) * longest_s
    assert rush.wait_s(victim, most_s) <= most_s


def test_until_it_has_aged_a_low_priority_waits() -> None:
    rush = Rush(1, [("a", 5)], lambda tenant: 60.0)
    waited_s = rush.wait_s(rush.add("v", 0), 99 * HOUR_S)
    assert 5 * AGEING_S <= waited_s <= 5 * AGEING_S + 60


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**30),
    rivals=st.integers(1, 5),
    devices=st.integers(1, 2),
    longest_s=st.floats(120, 2 * HOUR_S),
)
def test_a_tenant_that_had_all_devices_for_ever_has_its_turn_again(
    seed: int, rivals: int, devices: int, longest_s: float
) -> None:
    chance = random.Random(seed)
    names = [f"rival{number}" for number in range(rivals)]
    had_s = devices * HALF_LIFE_S / math.log(2)
    rush = Rush(
        devices,
        [(name, 0) for name in names],
        lambda tenant: chance.uniform(60, longest_s),
        shares(v=had_s),
    )
    tenants = rivals + 1
    most_s = HALF_LIFE_S * math.log2(tenants) + (tenants + 1) * (longest_s + ADVANCE_S)
    assert rush.wait_s(rush.add("v", 0), most_s) <= most_s


@pytest.mark.parametrize("devices", [1, 2])
def test_tenants_that_always_want_more_have_as_much_of_the_devices(devices: int) -> None:
    duration_s = {"short": 300.0, "longer": 1200.0, "long": HOUR_S}
    rush = Rush(devices, [(tenant, 0) for tenant in duration_s], lambda each: duration_s[each])
    had_s = Counter[str]()
    for granted in rush.grants():
        if rush.now_ns > NOW_NS + 400 * HOUR_S * 1e9:
            break
        had_s[granted.tenant] += round(duration_s[granted.tenant])
    mean_s = sum(had_s.values()) / 3
    assert all(abs(had - mean_s) < 0.1 * mean_s for had in had_s.values()), had_s
