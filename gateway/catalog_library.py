"""The catalog as a library: versions that jobs may train further."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from engine.base_model import ModuleShapes
from engine.catalog import AdapterCatalog
from engine.errors import AdapterNotReady
from engine.generation import VersionKey
from store.artifacts import CONFIG_FILE, WEIGHTS_FILE
from store.records import VersionNotReady, VersionState
from store.registry import Registry
from trainer.library import LibraryVersion

MAX_TOLD = 100
"""Versions that are looked at for those to tell a caller of."""


class CatalogLibrary:
    """A `Library` of the catalog of this gateway."""

    def __init__(self, catalog: AdapterCatalog, registry: Registry, modules: ModuleShapes) -> None:
        """`modules` are the base model's linear layers."""
        self._catalog = catalog
        self._registry = registry
        self._modules = modules

    @property
    def modules(self) -> Mapping[str, tuple[int, int]]:
        """See `Library.modules`."""
        return self._modules

    async def version(self, tenant: str, adapter: str, version: int | None) -> LibraryVersion:
        """See `Library.version`. Raises AdapterUnknown, AdapterNotReady if none has traffic,
        VersionUnknown, VersionNotReady, and AdapterLoadFailed for damaged files."""
        if version is None:
            version = await self._most_asked(tenant, adapter)
        record = await self._registry.version(tenant, adapter, version)
        if record.state is not VersionState.READY or record.content is None:
            raise VersionNotReady(adapter, version, record.state)
        found = await self._catalog.find(VersionKey(tenant, adapter, version))
        return LibraryVersion(
            version=version,
            config=Path(found.path) / CONFIG_FILE,
            weights=Path(found.path) / WEIGHTS_FILE,
            weights_sha256=record.content.weights_sha256,
            fingerprints=record.fingerprints,
        )

    async def _most_asked(self, tenant: str, adapter: str) -> int:
        """The version with the most traffic, the newest of several."""
        arms = (await self._registry.adapter(tenant, adapter)).arms
        if not arms:
            known = await self._registry.versions(tenant, adapter, limit=MAX_TOLD)
            ready = [one.version for one in known if one.state is VersionState.READY]
            raise AdapterNotReady(adapter, ready)
        return max(arms, key=lambda arm: (arm.weight, arm.version)).version
