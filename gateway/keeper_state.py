"""Where a shard stands, and why its core was started again."""

from __future__ import annotations

import enum


class KeeperState(enum.Enum):
    """Where a shard stands."""

    STARTING = "starting"
    UP = "up"
    DEAD = "dead"
    """Its core is gone, and the next one waits for its turn."""
    REBUILDING = "rebuilding"
    WARMING = "warming"
    """The core runs, and loads adapters. Nobody else uses it."""
    LENT = "lent"
    """Its device is lent to training: its core sleeps, or has ended."""
    STOPPED = "stopped"


TRANSITIONS: dict[KeeperState, frozenset[KeeperState]] = {
    KeeperState.STARTING: frozenset({KeeperState.UP, KeeperState.STOPPED}),
    KeeperState.UP: frozenset(
        {KeeperState.DEAD, KeeperState.REBUILDING, KeeperState.LENT, KeeperState.STOPPED}
    ),
    KeeperState.DEAD: frozenset({KeeperState.REBUILDING, KeeperState.STOPPED}),
    KeeperState.REBUILDING: frozenset({KeeperState.WARMING, KeeperState.DEAD, KeeperState.STOPPED}),
    KeeperState.WARMING: frozenset({KeeperState.UP, KeeperState.DEAD, KeeperState.STOPPED}),
    KeeperState.LENT: frozenset(
        {KeeperState.WARMING, KeeperState.REBUILDING, KeeperState.DEAD, KeeperState.STOPPED}
    ),
    KeeperState.STOPPED: frozenset(),
}


class Cause(enum.Enum):
    """Why a core was started again; the values are a metric's label."""

    DIED = "died"
    STALLED = "stalled"
    START_FAILED = "start_failed"
    RENEWED = "renewed"
    """It had few client slots left, and was ended for that."""
    LENT = "lent"
    """It was ended, or died, while its device was lent."""
