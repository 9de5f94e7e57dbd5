"""Replicas of hot adapters: planned from the tokens that workers report, loaded, then announced.

    tokens by adapter -> plan -> new copies are loaded -> all processes choose among them

Owned by the control plane. The plan itself is made by `engine/replication.py`.
"""

from __future__ import annotations

import asyncio
import logging

from engine.catalog import AdapterCatalog
from engine.errors import EngineError
from engine.generation import VersionKey
from engine.ledger import Ledger
from engine.replication import Planner
from engine.ring import AdapterKey, Plan
from gateway.processes import Processes
from gateway.shards import Shards
from gateway.token_meter import Tokens

logger = logging.getLogger(__name__)

PLAN_INTERVAL_S = 5.0
"""Shares are of an average over minutes, and a copy is loaded in well under a second."""


class Planning:
    """Keeps the plan, and has it followed."""

    def __init__(
        self,
        planner: Planner,
        shards: Shards,
        catalog: AdapterCatalog,
        ledger: Ledger,
        processes: Processes,
    ) -> None:
        self._planner = planner
        self._shards = shards
        self._catalog = catalog
        self._ledger = ledger
        self._processes = processes

    @property
    def plan(self) -> Plan:
        """The plan that is followed now."""
        return self._shards.pool.ring.plan

    def record(self, tokens: Tokens) -> None:
        """Count tokens that a worker reports."""
        for key, count in tokens.items():
            self._planner.record(key, count)

    async def run(self) -> None:
        """Plan every few seconds, until cancelled."""
        while True:
            await asyncio.sleep(PLAN_INTERVAL_S)
            await self.renew()

    async def renew(self) -> None:
        """Plan anew. Returns when the plan is followed."""
        async with self._shards.routing:  # or copies would be loaded where a drain moves them away
            await self._renew()

    async def _renew(self) -> None:
        ring = self._shards.pool.ring
        busy = await self._busy() if ring.plan.replicas else set[tuple[AdapterKey, str]]()
        plan = self._planner.plan(ring, lambda key, shard: (key, shard) in busy)
        if plan.revision == ring.plan.revision:
            return
        logger.info("plan %d: %d adapters have copies", plan.revision, len(plan.replicas))
        await self._warm(plan)
        self._shards.pool.follow(plan)
        await self._processes.follow(plan)

    async def _busy(self) -> set[tuple[AdapterKey, str]]:
        """Adapters with requests in flight, and where."""
        names = list(self._shards.residencies)
        uses = await asyncio.gather(*map(self._processes.uses, names))
        return {
            (AdapterKey(key.tenant, key.adapter), name)
            for name, used in zip(names, uses, strict=True)
            for key, use in used.items()
            if use.holds
        }

    async def _warm(self, plan: Plan) -> None:
        """Load what the plan has and the ring has not: callers find copies that are there."""
        ring = self._shards.pool.ring
        for adapter, _ in plan.replicas:
            shown = self._ledger.view.tenants.get(adapter.tenant, {}).get(adapter.adapter)
            if shown is None:
                continue
            new = set(ring.with_plan(plan).replicas(adapter)) - set(ring.replicas(adapter))
            for shard in sorted(new):
                for arm in shown.split.arms:
                    key = VersionKey(adapter.tenant, adapter.adapter, arm.version)
                    try:
                        await self._catalog.load_on(key, shard)
                    except EngineError as error:  # the first request tries again
                        logger.warning("%s: no copy of %s: %s", shard, adapter.adapter, error)
