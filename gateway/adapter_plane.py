"""The adapters' half of the control plane: what is registered, taken in, served and judged.

    Adapters -> catalog -> ledger -> registry
                   |          '----> view, to all processes
                   '-> intake, residency -> shards

Owned by the control plane, which opens, runs and closes it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path

from engine.base_model import ModelFingerprints, ModuleShapes
from engine.catalog import AdapterCatalog
from engine.generation import VersionKey
from engine.intake import Intake
from engine.ledger import Ledger
from engine.pool import ServedView
from engine.probe import Probe
from engine.trial import Trial
from gateway.adapters import Adapters
from gateway.admission import Admission, Slots
from gateway.arms import Arms
from gateway.call import Principal
from gateway.checkpoint_sources import TRAIN_SCHEME
from gateway.evaluation import Evaluations
from gateway.judgement import Judgement
from gateway.naming import Naming
from gateway.processes import Processes
from gateway.settings import Settings
from gateway.shards import Shards
from store.artifacts import ArtifactStore
from store.registry import Registry
from store.sources import AllowedSources
from store.uploads import UploadStore

logger = logging.getLogger(__name__)


class AdapterPlane:
    """Everything about adapters in one gateway."""

    def __init__(
        self,
        settings: Settings,
        state_dir: Path,
        registry: Registry,
        naming: Naming,
        processes: Processes,
        holds: Callable[[VersionKey], bool],
    ) -> None:
        """`holds` tells whether a version is in quarantine."""
        self._settings = settings
        self._registry = registry
        self._store = ArtifactStore(state_dir)
        self._sources = AllowedSources(settings.adapter_source_allow)
        self._naming = naming
        self.uploads = UploadStore(state_dir)
        self.ledger = Ledger(registry, naming)
        self.arms = Arms()
        self._judgement = Judgement(registry, self.ledger, self.arms, processes, holds)
        self._intake: Intake | None = None
        self._catalog: AdapterCatalog | None = None

    async def open(self) -> None:
        """Read what is registered."""
        await self.ledger.open()
        self._naming.open(self.ledger.view)

    @property
    def view(self) -> ServedView:
        """What may be asked for now."""
        return self.ledger.view

    @property
    def catalog(self) -> AdapterCatalog:
        """There once the base model is known."""
        assert self._catalog is not None
        return self._catalog

    def check_for(
        self,
        shapes: ModuleShapes,
        prints: ModelFingerprints,
        dtype: str,
        checkpoint: Callable[[str], Path],
    ) -> None:
        """Take in adapters for the base model with these modules, which computes in `dtype`;
        `checkpoint` finds the adapter's folder of a checkpoint by its URI."""
        rank = int(self._settings.max_lora_rank)
        self._intake = Intake(
            *(self._store, self.uploads, self._sources, shapes, prints),
            max_lora_rank=rank,
            dtype=dtype,
            folders={TRAIN_SCHEME: checkpoint},
        )
        self._catalog = AdapterCatalog(
            self.ledger, self._registry, self._store, self.uploads, self._intake
        )

    async def check(self, adapter: str, folder: Path) -> None:
        """Check the adapter in a folder of the operator's. Raises AdapterInvalid."""
        assert self._intake is not None
        async with self._intake.inspect_folder(adapter, folder):
            pass

    def serve(
        self, shards: Shards, trials: Mapping[str, Trial], admission: Admission, watches: Slots
    ) -> Adapters:
        """The servicer, which loads, probes and evaluates on these shards."""
        self.catalog.serve_on(shards.residencies, shards.pool, Probe(), trials)
        evaluations = Evaluations(
            self._registry, self._sources, shards, self._settings.max_num_seqs
        )
        return Adapters(
            *(self.catalog, self.ledger, self._registry, self.uploads, self._judgement),
            *(evaluations, admission, watches),
        )

    async def adopt(self, adapter: str, folder: Path) -> None:
        """Have the adapter in a folder of the operator's as a version, loaded. Raises
        AdapterInvalid."""
        tenant = Principal().tenant
        record = await self.catalog.adopt(tenant, adapter, folder)
        await self.catalog.load(VersionKey(tenant, adapter, record.version))
        arms = (await self._registry.adapter(tenant, adapter)).arms
        if all(arm.version != record.version for arm in arms):
            logger.warning(
                "adapter %s version %d is READY and has no traffic; to give it all: "
                "gateway adapters promote %s %d",
                *(adapter, record.version, adapter, record.version),
            )

    async def guard(self) -> None:
        """Roll back what breaches its guard, until cancelled."""
        await self._judgement.guard()

    async def close(self) -> None:
        """End what runs, and keep what was acknowledged."""
        if self._catalog is not None:
            await self._catalog.close()
        await self.ledger.close()
