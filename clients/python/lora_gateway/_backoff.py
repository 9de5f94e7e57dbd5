"""How long to wait before another try."""

from __future__ import annotations

import random

_FIRST_S = 0.1
_LONGEST_S = 5.0


class Backoff:
    """Delays that double from try to try, each with jitter, until something worked."""

    def __init__(self) -> None:
        self._next_s = _FIRST_S

    def delay_s(self, retry_delay_s: float | None) -> float:
        """The next delay; never less than `retry_delay_s`, which the server asked for."""
        # Between half and all of it: clients that lost one server do not come back as one.
        delay_s = self._next_s * random.uniform(0.5, 1)
        self._next_s = min(2 * self._next_s, _LONGEST_S)
        return max(delay_s, retry_delay_s or 0)

    def reset(self) -> None:
        """Begin anew: something worked."""
        self._next_s = _FIRST_S
