"""What jobs begin with: found by what `init_from` names, and held until the job is there.

find (a version, or a checkpoint) -> its shape is the job's -> hold -> create -> settle
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path

from store.artifacts import CONFIG_FILE, WEIGHTS_FILE
from store.job_records import JobRecord
from store.upload_folder import StorageFull
from trainer import held_weights
from trainer.checkpoint import CheckpointManifest
from trainer.errors import CheckpointUnknown, InitFromUnusable
from trainer.failure import is_storage_full
from trainer.held_weights import WeightsDiffer
from trainer.job_checkpoints import JobCheckpoints
from trainer.library import Library
from trainer.means import Means, differing
from trainer.origin import ADVICE, Origin, read_shape, taken_over
from trainer.run_folder import ADAPTER_FOLDER, MANIFEST_FILE
from trainer.spec import AdapterVersionSource, CheckpointSource, InitFrom, JobSpec

logger = logging.getLogger(__name__)


class Origins:
    """Of all jobs of one gateway."""

    def __init__(self, means: Means, checkpoints: JobCheckpoints, library: Library) -> None:
        self._means = means
        self._checkpoints = checkpoints
        self._library = library
        self._creating: set[str] = set()
        """Uids of jobs that are about to be created."""

    async def begun_with(self, tenant: str, spec: JobSpec) -> JobSpec:
        """The spec with the weights that it begins with named to the byte, and with their shape;
        one without `init_from` as it is.

        Raises InitFromUnusable, InvalidSpec for another shape, JobUnknown, CheckpointUnknown, and
        what `Library.version` raises.
        """
        if spec.init_from is None:
            return spec
        origin = await self._find(tenant, spec.init_from)
        changed = {"init_from": origin.init_from, "lora": taken_over(spec.lora, origin)}
        return spec.model_copy(update=changed)

    async def created(
        self, tenant: str, resolved: JobSpec, create: Callable[[str], Awaitable[JobRecord]]
    ) -> JobRecord:
        """The job of that spec, which `create` makes under a uid (empty: any), with the weights
        that it begins with.

        Raises as `begun_with` does if they are gone meanwhile, StorageFull, and what `create` does.
        """
        if resolved.init_from is None:
            return await create("")
        uid = uuid.uuid4().hex
        self._creating.add(uid)
        try:
            await self._hold(tenant, resolved.init_from, uid)
            try:
                job = await create(uid)
            except Exception:  # a store that raises has written nothing
                await self._drop(uid)
                raise
            if job.uid == uid:
                await self._settle(uid)
            else:  # the same request was here meanwhile
                await self._drop(uid)
            return job
        finally:
            self._creating.discard(uid)

    async def _hold(self, tenant: str, init_from: InitFrom, uid: str) -> None:
        origin = await self._find(tenant, init_from)
        try:
            await asyncio.to_thread(
                held_weights.hold,
                self._means.folder,
                uid,
                origin.weights,
                init_from.weights_sha256,
            )
        except WeightsDiffer as error:
            raise _damaged(init_from) from error
        except FileNotFoundError as error:
            raise InitFromUnusable(init_from.text, f"is gone: {ADVICE}") from error
        except OSError as error:
            if not is_storage_full(error):
                raise
            full = "the gateway's disk is full: have its operator free space"
            raise StorageFull(full) from error

    async def _drop(self, uid: str) -> None:
        await asyncio.to_thread(held_weights.drop, self._means.folder, uid)

    async def _settle(self, uid: str) -> None:
        """What fails here is done by the next start."""
        try:
            await asyncio.to_thread(held_weights.settle, self._means.folder, uid)
        except OSError:
            logger.exception("what job %s begins with cannot be put in its place", uid)

    async def sweep(self) -> None:
        """Settle what a crash left in between."""
        left = await asyncio.to_thread(
            held_weights.unsettled, self._means.folder, frozenset(self._creating)
        )
        if not left:
            return
        active = {uid for uid, _, _ in (await self._means.store.tally()).active}
        for uid in left:
            if uid in active:
                await self._settle(uid)
            else:
                await self._drop(uid)

    # --- where they are -----------------------------------------------------

    async def _find(self, tenant: str, asked: InitFrom) -> Origin:
        if asked.adapter_version is not None:
            return await self._version(tenant, asked, asked.adapter_version)
        assert asked.checkpoint is not None
        return await self._checkpoint(tenant, asked, asked.checkpoint)

    async def _version(self, tenant: str, asked: InitFrom, source: AdapterVersionSource) -> Origin:
        found = await self._library.version(tenant, source.adapter, source.version)
        pinned = source.model_copy(update={"version": found.version})
        init_from = asked.model_copy(update={"adapter_version": pinned})
        told = {name: value for name, value in found.fingerprints.items() if value}
        served = self._means.served.fingerprints
        self._require_base(init_from, told, {name: served.get(name, "") for name in told})
        return await self._origin(init_from, found.weights_sha256, found.config, found.weights)

    async def _checkpoint(self, tenant: str, asked: InitFrom, source: CheckpointSource) -> Origin:
        job = await self._means.store.job(tenant, source.job)
        saved = await self._checkpoints.saved(job)
        if source.step is not None:
            saved = [entry for entry in saved if entry[0].step == source.step]
        if not saved:
            raise CheckpointUnknown(source.job, source.step)
        checkpoint, path = saved[0]
        pinned = source.model_copy(update={"step": checkpoint.step})
        init_from = asked.model_copy(update={"checkpoint": pinned})
        self._require_base(init_from, job.fingerprints, self._means.served.fingerprints)
        sha256 = await asyncio.to_thread(_weights_sha256, path)
        config = path / ADAPTER_FOLDER / CONFIG_FILE
        return await self._origin(init_from, sha256, config, path / WEIGHTS_FILE)

    def _require_base(
        self, init_from: InitFrom, theirs: Mapping[str, str], served: Mapping[str, str]
    ) -> None:
        if changed := differing(theirs, served):
            raise InitFromUnusable(
                init_from.text,
                f"was trained on other files of a base model than are served "
                f"({', '.join(changed)} differ): {ADVICE}",
            )

    async def _origin(
        self, init_from: InitFrom, sha256: str, config: Path, weights: Path
    ) -> Origin:
        if init_from.weights_sha256 not in ("", sha256):
            raise InitFromUnusable(
                init_from.text,
                f"has weights of sha256 {sha256 or 'none'}, and weights_sha256 asks for "
                f"{init_from.weights_sha256}: leave that empty, or name another one",
            )
        if not sha256:
            raise _damaged(init_from)
        lora = await asyncio.to_thread(
            read_shape, init_from.text, config, weights, self._library.modules
        )
        return Origin(init_from.model_copy(update={"weights_sha256": sha256}), lora, weights)


def _weights_sha256(checkpoint: Path) -> str:
    """Of the weights as they were trained, as the manifest has it; empty: it has none."""
    try:
        content = (checkpoint / MANIFEST_FILE).read_bytes()
        return CheckpointManifest.model_validate_json(content).files.get(WEIGHTS_FILE, "")
    except (OSError, ValueError):
        return ""


def _damaged(init_from: InitFrom) -> InitFromUnusable:
    return InitFromUnusable(init_from.text, f"is damaged: {ADVICE}")
