"""When a core that died is started again: at once, or later and later in a crash loop."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

MANY_DEATHS = 3
WITHIN_S = 300.0
"""So many deaths in that time open the breaker, and a life of that length closes it."""
LONGEST_DELAY_S = 60.0


class Restarts:
    """The deaths of one shard, and the breaker that they open.

    A core that dies once was unlucky, and its callers wait: it is started at once. One that dies
    again and again costs its shard's requests each time, and the machine a load of the model.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock` tells seconds, and never goes back."""
        self._clock = clock
        self._deaths: deque[float] = deque(maxlen=MANY_DEATHS)
        self._delay_s = 0.0
        self._up_s: float | None = None
        """Since when the shard is up, if it is."""

    @property
    def breaker_open(self) -> bool:
        """Whether the shard is in a crash loop."""
        return self._delay_s > 0.0

    def up(self) -> None:
        """Note that the shard takes requests from now on, or again with a core that replaced one
        which had not died."""
        if self._up_s is None:
            self._up_s = self._clock()

    def died(self) -> float:
        """Note a death, or a start that failed; returns how many seconds to wait now."""
        now_s = self._clock()
        if self._up_s is not None and now_s - self._up_s >= WITHIN_S:
            self._deaths.clear()
            self._delay_s = 0.0
        self._up_s = None
        self._deaths.append(now_s)
        if self.breaker_open:
            self._delay_s = min(LONGEST_DELAY_S, 2 * self._delay_s)
        elif len(self._deaths) == MANY_DEATHS and now_s - self._deaths[0] < WITHIN_S:
            self._delay_s = 1.0
        return self._delay_s
