"""Names for labels: given by the tokens that workers report, and told to all of them.

    an adapter is shown, or shares of the tokens change -> names -> all workers

Owned by the control plane. Who gets one is decided in `gateway/adapter_labels.py`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping

from engine.ledger import Audience
from engine.pool import ServedAdapter, ServedView
from engine.ring import AdapterKey
from gateway import metrics
from gateway.adapter_labels import MAX_NAMES_GIVEN, AdapterNames, Dropped
from gateway.messages import NameAdapters
from gateway.workers import WorkerFleet

logger = logging.getLogger(__name__)

INTERVAL_S = 5.0
"""Shares are of an average over minutes; a busy adapter is not to be without a name for long."""


class Naming:
    """Keeps the names. Hears of each adapter before those who are called for it do."""

    def __init__(
        self,
        shares: Callable[[], Mapping[AdapterKey, float]],
        audience: Audience,
        fleet: WorkerFleet,
    ) -> None:
        """`shares` tells the share of the tokens of each adapter, the largest first; `audience`
        are those to whom adapters are shown."""
        self._shares = shares
        self._audience = audience
        self._fleet = fleet
        self._names = AdapterNames()

    @property
    def named(self) -> frozenset[AdapterKey]:
        """The adapters that have a name, for a process that joins."""
        return self._names.named

    def open(self, view: ServedView) -> None:
        """Take in the adapters that are there when the gateway starts."""
        self._names.show_all(
            [
                AdapterKey(tenant, adapter)
                for tenant, adapters in view.tenants.items()
                for adapter, served in adapters.items()
                if served.ready
            ]
        )

    def show(self, tenant: str, adapter: str, served: ServedAdapter) -> Awaitable[None]:
        """See `Audience.show`. The name is there before the first call for it."""
        if self._names.show(AdapterKey(tenant, adapter), bool(served.ready)):
            self._tell()
        return self._audience.show(tenant, adapter, served)

    async def run(self) -> None:
        """Look every few seconds who has the traffic, until cancelled."""
        while True:
            await asyncio.sleep(INTERVAL_S)
            self.renew()

    def renew(self) -> None:
        """Give names by the traffic of late."""
        named = self._names.named
        dropped = self._names.rank(self._shares())
        for reason in dropped:
            metrics.observe_dropped(reason)
        if Dropped.SPENT in dropped:
            logger.warning(
                "all %d names for metrics are given: adapters that are called for the first "
                "time from now on are counted together, until a restart",
                MAX_NAMES_GIVEN,
            )
        if self._names.named != named:
            self._tell()

    def _tell(self) -> None:
        self._fleet.tell(NameAdapters(self._names.named))
