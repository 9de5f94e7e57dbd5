"""A blow: what is killed or stopped, and how long the gateway took to be whole again."""

from __future__ import annotations

import enum
import itertools
import random
from dataclasses import dataclass


class BlowKind(enum.Enum):
    """What is done to whom."""

    CORE_KILLED = "core SIGKILL"
    CORE_STOPPED = "core SIGSTOP"
    WORKER_KILLED = "worker SIGKILL"


FEWEST_OF_EACH = 2


@dataclass(slots=True)
class Blow:
    """One of them. Times are of the monotonic clock."""

    kind: BlowKind
    target: str
    """The shard, or the worker's pid."""
    at_s: float
    whole_s: float | None = None
    """When everything was there again; None if it never was."""

    @property
    def hits_core(self) -> bool:
        """Whether it is a core that is gone, and not a worker."""
        return self.kind is not BlowKind.WORKER_KILLED


def plan(count: int, chance: random.Random) -> list[BlowKind]:
    """Kinds of so many blows, in an order of chance: at least two of each, as far as they go."""
    certain = itertools.islice(itertools.cycle(BlowKind), FEWEST_OF_EACH * len(BlowKind))
    kinds = [*certain][:count]
    kinds += chance.choices([*BlowKind], k=count - len(kinds))
    chance.shuffle(kinds)
    return kinds
