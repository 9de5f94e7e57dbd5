"""Which blows `make chaos` deals."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from tests.chaos.blow import BlowKind, plan


@pytest.mark.parametrize("count", [6, 7, 10, 30])
def test_each_kind_comes_twice_at_least_and_a_seed_gives_the_same_again(count: int) -> None:
    plans = [plan(count, random.Random(seed)) for seed in range(50)]
    for seed, kinds in enumerate(plans):
        counts = Counter(kinds)
        assert len(kinds) == count and all(counts[kind] >= 2 for kind in BlowKind)
        assert kinds == plan(count, random.Random(seed))
    assert len({tuple(kinds) for kinds in plans}) > 25, "the order is of chance"
