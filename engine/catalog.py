"""The adapters that are served: from a folder to READY on the shard, by the safe path.

    copy -> check -> commit under its digest -> register -> add_lora -> serve

vLLM sees only our own immutable copy, only after it was checked, and first by `add_lora`,
whose failure is an answer; the same failure inside `generate` would end the engine for
everyone (ADR 0004).
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, replace
from pathlib import Path

from engine.adapters import AdapterFacts, check_adapter
from engine.base_model import ModuleShapes
from engine.errors import AdapterInvalid, GenerationFailed
from engine.generation import ServedVersion
from engine.pool import ServedAdapter, ServedView
from engine.shard import VllmShard
from store.artifacts import Artifact, ArtifactStore, SourceUnusable
from store.registry import Registry, VersionRecord

logger = logging.getLogger(__name__)

LOAD_ATTEMPTS = 2
"""A failed `add_lora` may be passing; each attempt gets a new id (ADR 0004)."""


@dataclass(frozen=True, slots=True)
class CheckedAdapter:
    """An adapter whose copy is ours, checked and immutable; no engine has seen it yet."""

    adapter: str
    artifact: Artifact
    facts: AdapterFacts


class AdapterCatalog:
    """Takes adapters in, loads them on a shard, knows what is served. Owned by the host."""

    def __init__(
        self,
        store: ArtifactStore,
        registry: Registry,
        shapes: ModuleShapes,
        *,
        max_lora_rank: int,
        dtype: str,
    ) -> None:
        """`shapes` are the base model's linear modules, `dtype` is what it computes in."""
        self._store = store
        self._registry = registry
        self._shapes = shapes
        self._max_lora_rank = max_lora_rank
        self._dtype = dtype
        self._served: dict[str, ServedAdapter] = {}

    def view(self) -> ServedView:
        """What is served now, for the workers."""
        return ServedView(dict(self._served))

    async def take(self, adapter: str, source: Path) -> CheckedAdapter:
        """Copy the adapter in `source` and check the copy. Needs no engine.

        Raises AdapterInvalid with every finding.
        """
        return await asyncio.to_thread(self._take, adapter, source)

    def _take(self, adapter: str, source: Path) -> CheckedAdapter:
        try:
            with self._store.stage(source) as staged:
                facts = check_adapter(
                    staged.path,
                    adapter=adapter,
                    shapes=self._shapes,
                    max_lora_rank=self._max_lora_rank,
                    dtype=self._dtype,
                )
                return CheckedAdapter(adapter, staged.commit(), facts)
        except SourceUnusable as error:
            raise AdapterInvalid(adapter, [str(error)]) from error

    async def serve(self, tenant: str, checked: CheckedAdapter, shard: VllmShard) -> ServedVersion:
        """Load the adapter on the shard and serve it; its bytes decide whether it is a new
        version. Raises AdapterInvalid if the engine refuses it.
        """
        record = await self._registry.register(tenant, checked.adapter, checked.artifact.digest)
        version = await self._load(_served_version(record, checked.artifact), shard)
        self._served[checked.adapter] = ServedAdapter(version.version, {version.version: version})
        for warning in checked.facts.warnings:
            logger.warning("adapter %s: %s", checked.adapter, warning)
        logger.info(
            "adapter %s version %d is served: rank %d, digest %s",
            checked.adapter,
            version.version,
            checked.facts.rank,
            checked.artifact.digest[:12],
        )
        return version

    async def _load(self, version: ServedVersion, shard: VllmShard) -> ServedVersion:
        for attempt in range(1, LOAD_ATTEMPTS + 1):
            try:
                await shard.load(version)
                return version
            except GenerationFailed as error:
                logger.warning("adapter %s: attempt %d: %s", version.adapter, attempt, error)
                refusal = AdapterInvalid(version.adapter, [f"the engine refuses it: {error}"])
                version = await self._with_new_id(version)
        raise refusal

    async def _with_new_id(self, version: ServedVersion) -> ServedVersion:
        lora_int_id = await self._registry.mint_lora_int_id(
            version.tenant, version.adapter, version.version
        )
        return replace(version, lora_int_id=lora_int_id)


def _served_version(record: VersionRecord, artifact: Artifact) -> ServedVersion:
    return ServedVersion(
        tenant=record.tenant,
        adapter=record.adapter,
        version=record.version,
        lora_int_id=record.lora_int_id,
        path=str(artifact.path),
        digest=artifact.digest,
    )
