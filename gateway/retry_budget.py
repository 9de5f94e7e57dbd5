"""How many calls may be tried a second time at once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from gateway import metrics
from gateway.admission import Admission

LEAST = 3
SHARE = 0.1
"""Of the requests that are generated. When a shard of two dies, half of all calls want to be tried
again; all of them at once would be twice the load for the shard that is left."""


class RetryBudget:
    """The second tries of one worker."""

    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self._running = 0
        self._suspects = 0

    def has_room(self, suspect: bool = False) -> bool:
        """Whether one more may be tried again now. Of suspects of a crash, one at a time."""
        if suspect and self._suspects:
            return False
        return self._running < self._most

    @property
    def _most(self) -> float:
        return max(LEAST, SHARE * self._admission.held)

    @contextmanager
    def retry(self, suspect: bool = False) -> Iterator[None]:
        """Count a second try while it runs."""
        self._count(+1)
        self._suspects += suspect
        try:
            yield
        finally:
            self._suspects -= suspect
            self._count(-1)

    def _count(self, more: int) -> None:
        self._running += more
        metrics.retry_budget_used.set(self._running / self._most)
