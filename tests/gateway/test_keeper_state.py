"""The moves that a shard can make, and no other."""

from __future__ import annotations

import itertools
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from engine.core import EngineOptions
from engine.screening import Screening
from gateway import metrics
from gateway.keeper import ShardKeeper
from gateway.keeper_state import TRANSITIONS, KeeperState

OPTIONS: Any = object.__new__(EngineOptions)
"""Nothing is started by them."""
STARTING, UP, DEAD = KeeperState.STARTING, KeeperState.UP, KeeperState.DEAD
REBUILDING, WARMING, STOPPED = KeeperState.REBUILDING, KeeperState.WARMING, KeeperState.STOPPED
LENT = KeeperState.LENT
ALLOWED = {
    (STARTING, UP),
    *itertools.pairwise((UP, DEAD, REBUILDING, WARMING, UP)),
    (UP, REBUILDING),
    (REBUILDING, DEAD),
    (WARMING, DEAD),
    *((UP, LENT), (LENT, WARMING), (LENT, REBUILDING), (LENT, DEAD)),
    *((state, STOPPED) for state in KeeperState if state is not STOPPED),
}


@pytest.mark.parametrize(
    ("before", "after"), list(itertools.product(KeeperState, repeat=2)), ids=lambda s: s.value
)
def test_a_shard_makes_the_moves_that_are_allowed_and_no_other(
    before: KeeperState, after: KeeperState
) -> None:
    keeper = ShardKeeper(*("shard-1", OPTIONS, nullcontext, 1.0, Path(), Screening()))
    keeper.state = before
    if (before, after) in ALLOWED:
        keeper.move(after)
        assert keeper.state is after
        assert metrics.shard_up.labels("shard-1")._value.get() == (after is UP)
    else:
        with pytest.raises(ValueError, match="shard-1 cannot go from"):
            keeper.move(after)
        assert keeper.state is before


def test_the_table_has_every_state() -> None:
    assert TRANSITIONS.keys() == set(KeeperState)
