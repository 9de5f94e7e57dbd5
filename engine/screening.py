"""What one process keeps from its engines, as the host has told it, and what it tells the host."""

from __future__ import annotations

import time
from collections.abc import Callable

from engine.errors import AdapterQuarantined, PoisonRequest
from engine.generation import ServedVersion
from engine.quarantine import Quarantined


class Screening:
    """Looks at each request before an engine gets it. Costs nothing while nobody is in
    quarantine."""

    def __init__(
        self,
        acquit: Callable[[int], None] = lambda fingerprint: None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`acquit` is told of each suspect that was answered to its end. `clock` tells seconds
        since the epoch."""
        self._acquit = acquit
        self._clock = clock
        self._held = Quarantined()
        self._anybody = False
        self._suspects: set[int] = set()

    def follow(self, held: Quarantined) -> None:
        """Screen by this from now on."""
        self._held = held
        self._anybody = bool(held.requests or held.versions)
        self._suspects = set(held.suspects)

    def check(self, fingerprint: int, version: ServedVersion | None) -> None:
        """Raises PoisonRequest or AdapterQuarantined."""
        if not self._anybody:
            return
        until_s = self._held.requests.get(fingerprint, 0.0)
        if until_s > self._clock():
            raise PoisonRequest(fingerprint, until_s)
        if version is not None:
            until_s = self._held.versions.get(version.lora_name, 0.0)
            if (left_s := until_s - self._clock()) > 0:
                raise AdapterQuarantined(version.adapter, version.version, until_s, left_s)

    def finished(self, fingerprint: int) -> None:
        """An engine answered this to its end."""
        if fingerprint in self._suspects:
            self._suspects.discard(fingerprint)
            self._acquit(fingerprint)
