"""Tokens of the last minutes, by adapter, as workers report them."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable

from engine.ring import AdapterKey
from gateway.token_meter import Tokens

INTERVAL_S = 2.0
KEPT = 60
"""Intervals: two minutes."""
LATELY = 30
"""Intervals: one minute."""


class Throughput:
    """Counts what ended calls have used. Of one event loop."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock` tells seconds, and never goes back."""
        self._clock = clock
        self._counts: deque[Counter[AdapterKey | None]] = deque(maxlen=KEPT)
        """By interval, the newest last."""
        self._number = self._now()
        """Of the newest interval."""

    def record(self, tokens: Tokens) -> None:
        """Count tokens that a worker reports; None is the base model."""
        self._go_on()
        if not self._counts:
            self._counts.append(Counter())
        self._counts[-1].update(tokens)

    def per_s(self) -> list[float]:
        """Tokens a second in each whole interval that is kept, the newest last."""
        self._go_on()
        whole = list(self._counts)[:-1]
        rates = [counts.total() / INTERVAL_S for counts in whole]
        return [0.0] * (KEPT - 1 - len(rates)) + rates

    def by_adapter(self) -> dict[AdapterKey | None, float]:
        """Tokens a second in the last minute; adapters without any are left out."""
        self._go_on()
        total: Counter[AdapterKey | None] = Counter()
        for counts in list(self._counts)[-LATELY:]:
            total.update(counts)
        return {key: count / (LATELY * INTERVAL_S) for key, count in total.items()}

    def _now(self) -> int:
        return int(self._clock() / INTERVAL_S)

    def _go_on(self) -> None:
        """Begin the intervals that have begun since."""
        now = self._now()
        for _ in range(min(KEPT, now - self._number)):
            self._counts.append(Counter())
        self._number = now
