"""What the host makes of cores that crash: who is suspected, and who is quarantined.

    keeper: CoreDeath -> Quarantine -> all processes, with the news of the death: before a suspect
                                       may be tried again

Owned by the control plane.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

from prometheus_client import Metric
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from engine.core_death import CoreDeath
from engine.generation import VersionKey, lora_name_of
from engine.quarantine import QUARANTINE_S, Kind, Quarantine, Quarantined
from engine.screening import Screening
from gateway import metrics

logger = logging.getLogger(__name__)

MAX_NAMED = 8
"""Requests that a line of the log names."""


class Crashes(Collector):
    """Judges deaths, and shows what is in quarantine on the metrics page."""

    def __init__(self, quarantine: Quarantine | None = None) -> None:
        self.quarantine = quarantine or Quarantine()
        self.screening = Screening(self.acquit)
        """The host's own: for probes and evaluations."""

    @property
    def state(self) -> Quarantined:
        """What is in quarantine now, for a new worker."""
        return self.quarantine.state

    def judge(self, shard: str, death: CoreDeath) -> Quarantined:
        """Note a death. Returns what is in quarantine from now on."""
        steps = death.steps
        if death.crashed and steps.requests:
            ids = sorted(request.request_id for request in steps.requests)
            more = f" and {len(ids) - MAX_NAMED} more" if len(ids) > MAX_NAMED else ""
            logger.warning(
                "%s crashed while it computed %s", shard, ", ".join(ids[:MAX_NAMED]) + more
            )
            metrics.crash_suspects.labels(shard).inc(len(ids))
            for kind, name in self.quarantine.crashed(steps):
                text = f"{name:016x}" if isinstance(name, int) else name
                logger.error(
                    "%s %s was there in two crashes: quarantined for %g s",
                    *(kind.value.replace("_", " "), text, QUARANTINE_S),
                )
        return self._followed()

    def acquit(self, fingerprint: int) -> None:
        """A process saw this one answered to its end."""
        self.quarantine.acquit(fingerprint)

    def lift(self, kind: Kind, name: int | str) -> Quarantined | None:
        """Release one at once. Returns what is left in quarantine, for all to follow; None if it
        was not there."""
        return self._followed() if self.quarantine.lift(kind, name) else None

    def holds(self, key: VersionKey) -> bool:
        """Whether that version is in quarantine."""
        return self.quarantine.holds_version(lora_name_of(key))

    def _followed(self) -> Quarantined:
        state = self.quarantine.state
        self.screening.follow(state)
        return state

    def collect(self) -> Iterator[Metric]:
        """For the metrics page: some end by time alone, so they are counted when it is made."""
        gauge = GaugeMetricFamily(
            "gateway_poison_quarantined",
            "What is refused because engines crashed on it: request, adapter_version.",
            labels=["kind"],
        )
        for kind, count in self.quarantine.counts().items():
            gauge.add_metric([kind.value], count)
        yield gauge
