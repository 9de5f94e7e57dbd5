"""The catalog: every adapter version from its source to READY, and from READY to its end.

    begin (a number) -> inspect (copy, check) -> keep -> load and try -> READY
    drain (nobody gets it) -> out of every engine -> DELETED -> files gone

The registry decides what is true. What a crash interrupts is done again at the next start.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

from engine.adapters import AdapterFacts
from engine.errors import (
    AdapterInvalid,
    AdapterLoadFailed,
    AdapterNotChecked,
    EngineError,
    LoadFault,
    ShardUnavailable,
)
from engine.generation import ServedVersion, VersionKey
from engine.intake import UPLOAD_SCHEME, Announced, Inspected, Intake
from engine.ledger import Ledger
from engine.pool import ShardPool
from engine.probe import Probe
from engine.residency import Place, Residency
from engine.served import key_of, name_of, served
from engine.shelf import Shelf, finished, to_its_end
from engine.trial import Trial, TryOut
from store.artifacts import ArtifactDamaged, ArtifactStore
from store.records import (
    AdapterRecord,
    Arm,
    Content,
    Guard,
    NewVersion,
    RequestIdReused,
    VersionRecord,
    VersionState,
)
from store.registry import Registry
from store.sources import SourceNotAllowed
from store.uploads import UploadBusy, UploadStore

logger = logging.getLogger(__name__)

Refusal: TypeAlias = AdapterInvalid | None
"""Why a validation ended in FAILED; None: it did not."""

ADOPT_SCHEME = "adopt:"
"""What request ids of adopted folders begin with."""
GATEWAY = "gateway"
"""Actor of what the gateway does by itself."""
INTERNAL_FINDING = "the gateway failed to check it, and logged why: tell the operator, and retry"


class AdapterCatalog:
    """All adapters of one gateway. Owned by the host, which calls `close`."""

    def __init__(
        self,
        ledger: Ledger,
        registry: Registry,
        store: ArtifactStore,
        uploads: UploadStore,
        intake: Intake,
    ) -> None:
        """Changes go through `ledger`; `registry` is read."""
        self._ledger = ledger
        self._registry = registry
        self._shelf = Shelf(store, registry)
        self._uploads = uploads
        self._intake = intake
        self._residencies: Mapping[str, Residency] = {}
        self._pool: ShardPool | None = None
        self._try_out: TryOut | None = None
        self._candidates: dict[VersionKey, ServedVersion] = {}
        """Versions that are loaded and tried before they are READY."""
        self._work: dict[tuple[VersionKey, VersionState], asyncio.Task[Refusal]] = {}
        """Validations and deletions that run, by the state that they are to end."""
        self._closing = False
        self._begun: set[asyncio.Task[Any]] = set()  # steps that go on when their caller leaves

    @property
    def running(self) -> int:
        """Validations and deletions that run or wait for their turn."""
        return len(self._work)

    def serve_on(
        self,
        residencies: Mapping[str, Residency],
        pool: ShardPool,
        probe: Probe,
        trials: Mapping[str, Trial] = {},
    ) -> None:
        """Load and try from now on: on the shards of `residencies`, which may come and go, as
        the ring of `pool` says. `trials` as TryOut has them."""
        self._residencies = residencies
        self._pool = pool
        self._try_out = TryOut(self.load_on, pool, probe, trials)

    async def resume(self) -> None:
        """Go on with what the last process left undone, and sweep what it left over."""
        await self._shelf.sweep()
        await self.go_on()

    async def go_on(self) -> None:
        """Do again what a shard that died, or the last process, left undone."""
        for record in await self._registry.versions_in(VersionState.VALIDATING):
            logger.info("goes on with the validation of %s", name_of(record))
            self._begin_work(record, self._validate(record))
        for record in await self._registry.versions_in(VersionState.DRAINING):
            logger.info("goes on with the deletion of %s", name_of(record))
            self._begin_work(record, self._finish_deletion(record))

    async def close(self) -> None:
        """Stop what runs; the next start goes on with it."""
        self._closing = True
        while self._work or self._begun:
            for task in self._work.values():
                task.cancel()
            await asyncio.wait({*self._work.values(), *self._begun})

    # --- from a source to READY ---------------------------------------------

    async def validate(
        self, tenant: str, source_uri: str, announced: Announced
    ) -> tuple[AdapterFacts, Content]:
        """Check an adapter and keep nothing. Raises AdapterInvalid, SourceNotAllowed."""
        self._intake.check_source(source_uri, source_uri)
        async with self._intake.inspect(tenant, source_uri, source_uri, announced) as inspected:
            return inspected.facts, inspected.content

    async def create(self, new: NewVersion, *, request_id: str, actor: str) -> VersionRecord:
        """Begin a version, or find the one that this request made. Returns at once.

        Raises AdapterInvalid and SourceNotAllowed for what cannot be a source, and
        RequestIdReused.
        """
        if not self._intake.is_own(new.source_uri):
            self._intake.check_source(new.adapter, new.source_uri)
        return await self._surely(self._create(new, request_id, actor))

    async def _create(self, new: NewVersion, request_id: str, actor: str) -> VersionRecord:
        record = await self._ledger.begin(new, request_id=request_id, actor=actor)
        if record.state is VersionState.VALIDATING:
            self._begin_work(record, self._validate(record))
        return record

    async def settled(self, record: VersionRecord) -> VersionRecord:
        """The version once it is READY. When it fails, raises AdapterInvalid: the kind that says
        why, unless it had failed before this was called.
        """
        key, kind = key_of(record), AdapterInvalid
        if (work := self._work.get((key, VersionState.VALIDATING))) is not None:
            refusal = await asyncio.shield(work)
            kind = type(refusal) if refusal is not None else kind
        record = await self._registry.version(*key)
        if record.state is VersionState.FAILED:
            raise kind(record.adapter, record.findings, record.version)
        return record

    async def adopt(self, tenant: str, adapter: str, folder: Path) -> VersionRecord:
        """A READY version with the files of a folder that the operator named, made unless
        there is one. Raises AdapterInvalid.
        """
        async with self._intake.inspect_folder(adapter, folder) as inspected:
            found = await self._registry.find_ready(tenant, adapter, inspected.staged.digest)
            if found is not None:
                await to_its_end(inspected.staged.commit)  # if the folder is gone
                return found
            record = await self._begin_adopted(
                NewVersion(tenant, adapter, str(folder)), inspected.staged.digest
            )
            try:
                await self._admit(record, inspected)
            except AdapterInvalid as error:
                await self._refuse(record, error)
                raise
        return await self._registry.version(*key_of(record))

    async def _begin_adopted(self, new: NewVersion, digest: str) -> VersionRecord:
        """The version that an earlier start was cut off with, or a new one."""
        request_id = f"{ADOPT_SCHEME}{new.adapter}:{digest}"
        with contextlib.suppress(RequestIdReused):  # the same bytes lay elsewhere then
            record = await self._ledger.begin(new, request_id=request_id, actor=GATEWAY)
            if record.state is VersionState.VALIDATING:
                return record
        return await self._ledger.begin(new, request_id="", actor=GATEWAY)

    async def _validate(self, record: VersionRecord) -> Refusal:
        """From VALIDATING to READY or FAILED. If a shard dies, the next start goes on."""
        record = await self._registry.version(*key_of(record))
        if record.state is not VersionState.VALIDATING:
            return None  # since it was looked at
        announced = Announced(record.expected_sha256, record.fingerprints)
        refusal: Refusal = None
        try:
            async with self._intake.inspect(
                record.tenant, record.adapter, record.source_uri, announced
            ) as inspected:
                await self._admit(record, inspected)
        except AdapterInvalid as error:
            refusal = error
        except SourceNotAllowed as error:  # allowed before a restart
            refusal = AdapterInvalid(record.adapter, [str(error)])
        except ArtifactDamaged as error:
            refusal = AdapterNotChecked(record.adapter, [str(error)])
        except OSError as error:
            logger.error("%s: %s", name_of(record), error)
            reason = f"the gateway could not store it ({error.strerror}): create it again later"
            refusal = AdapterNotChecked(record.adapter, [reason])
        if refusal is not None:
            await self._refuse(record, refusal)
        if record.source_uri.startswith(UPLOAD_SCHEME):
            upload_id = record.source_uri.removeprefix(UPLOAD_SCHEME)
            with contextlib.suppress(UploadBusy, OSError):  # else it is swept
                await asyncio.to_thread(self._uploads.drop, record.tenant, upload_id)
        return refusal

    async def _admit(self, record: VersionRecord, inspected: Inspected) -> None:
        """Keep the files, load and try the version, make it READY. Raises AdapterInvalid;
        then nothing of it is left in the store or in an engine."""
        key, content = key_of(record), inspected.content
        ready = False
        try:
            async with self._shelf.keeping(inspected.staged) as artifact:
                self._candidates[key] = served(record, content.digest, artifact.path)
                assert self._try_out is not None
                await self._try_out.run(record)
                await finished(self._ledger.complete(key, content, actor=GATEWAY))
            ready = True
            logger.info("%s is READY: rank %d", name_of(record), content.rank)
        finally:
            self._candidates.pop(key, None)
            if not ready:
                await asyncio.shield(self._forget(key, content.digest))

    async def _refuse(self, record: VersionRecord, refusal: AdapterInvalid) -> None:
        await self._ledger.fail(key_of(record), refusal.findings, actor=GATEWAY)
        logger.warning("%s FAILED: %s", name_of(record), "; ".join(refusal.findings))

    # --- from READY to the end ----------------------------------------------

    async def delete(self, key: VersionKey, *, actor: str) -> VersionRecord:
        """Delete a version without traffic, once its last request has ended.

        Cancelled, it goes on. Raises VersionInUse, TransitionRefused, VersionUnknown.
        """
        return await self._surely(self._delete(key, actor))

    async def _delete(self, key: VersionKey, actor: str) -> VersionRecord:
        record = await self._ledger.drain(key, actor=actor)
        if record.state is VersionState.DRAINING:
            await asyncio.shield(self._begin_work(record, self._finish_deletion(record)))
        elif record.state is VersionState.FAILED:
            await self._ledger.delete(key, actor=actor)
        return await self._registry.version(*key)

    async def _finish_deletion(self, record: VersionRecord) -> None:
        key = key_of(record)
        if (validation := self._work.get((key, VersionState.VALIDATING))) is not None:
            await asyncio.wait((validation,))  # READY, and still putting things away
        await self.unload(key)
        await self._ledger.delete(key, actor=GATEWAY)
        if record.content is not None:
            await self._forget(key, record.content.digest)
        logger.info("%s is DELETED", name_of(record))

    async def _forget(self, key: VersionKey, digest: str) -> None:
        """Out of all engines; and its files are removed if no other version has them."""
        await self.unload(key)
        await self._shelf.remove_unused(digest)

    # --- traffic ------------------------------------------------------------

    async def set_traffic(
        self,
        tenant: str,
        adapter: str,
        arms: Sequence[Arm],
        *,
        guard: Guard | None,
        etag: str,
        actor: str,
    ) -> AdapterRecord:
        """Split traffic, over versions that are loaded by then.

        Raises AdapterUnknown, VersionUnknown, VersionNotReady, EtagMismatch and
        AdapterLoadFailed; then the split is as it was.
        """
        for arm in arms:
            await self._load_if_ready(VersionKey(tenant, adapter, arm.version))
        return await self._ledger.set_traffic(
            tenant, adapter, arms, guard=guard, etag=etag, actor=actor
        )

    async def promote(self, key: VersionKey, *, etag: str, actor: str) -> AdapterRecord:
        """Give one version all traffic. Raises as `set_traffic` does."""
        await self._load_if_ready(key)
        return await self._ledger.promote(key, etag=etag, actor=actor)

    async def _load_if_ready(self, key: VersionKey) -> None:
        """Before callers come; the registry refuses what is not READY, in its own words."""
        if (await self._registry.version(*key)).state is VersionState.READY:
            await self.load(key)

    # --- engines ------------------------------------------------------------

    async def load(self, key: VersionKey) -> None:
        """Load a version on the shards that the ring names for its adapter.

        Raises AdapterLoadFailed, ShardUnavailable.
        """
        assert self._pool is not None
        for route in self._pool.homes(key):
            await self.load_on(key, route.shard.name)

    async def load_on(self, key: VersionKey, shard: str) -> None:
        """Load a version on this shard. Raises AdapterLoadFailed, ShardUnavailable."""
        if shard not in self._residencies:
            raise ShardUnavailable(shard)
        await self._residencies[shard].ensure(key)

    async def unload(self, key: VersionKey) -> None:
        """Take a version out of all shards, once nothing runs on it there."""
        await asyncio.gather(*(r.remove(key) for r in self._residencies.values()))

    def places(self, key: VersionKey) -> dict[str, Place]:
        """Where a version is resident, by shard."""
        return {name: p for name, r in self._residencies.items() if (p := r.place(key)) is not None}

    async def find(self, key: VersionKey) -> ServedVersion:
        """The version with its verified files, to be loaded. Raises AdapterLoadFailed."""
        if (candidate := self._candidates.get(key)) is not None:
            return candidate
        record = await self._registry.version(*key)
        if record.state is not VersionState.READY or record.content is None:
            raise AdapterLoadFailed(*key[1:], f"it is {record.state.name}", LoadFault.STATE)
        try:
            artifact = await self._shelf.verified(record.content.digest)
        except ArtifactDamaged as error:
            raise AdapterLoadFailed(*key[1:], str(error), LoadFault.FILES) from error
        return served(record, record.content.digest, artifact.path)

    async def with_new_id(self, version: ServedVersion) -> ServedVersion:
        """The same version under an id that no engine has seen."""
        renamed = replace(version, lora_int_id=await self._registry.mint_lora_int_id(*version.key))
        if version.key in self._candidates:  # may be loaded again before it is READY
            self._candidates[version.key] = renamed
        return renamed

    def _begin_work(
        self, record: VersionRecord, work: Coroutine[Any, Any, Refusal]
    ) -> asyncio.Task[Refusal]:
        """Run a validation or deletion, once at a time for each version."""
        name = key_of(record), record.state
        if name in self._work:
            work.close()
            return self._work[name]
        task = self._work[name] = asyncio.create_task(self._until_done(record, work))
        task.add_done_callback(lambda task: self._end_work(name, task))
        if self._closing:  # by a change that `close` waits for: it would wait for requests
            work.close()
            task.cancel()
        return task

    async def _until_done(
        self, record: VersionRecord, work: Coroutine[Any, Any, Refusal]
    ) -> Refusal:
        try:
            return await work
        except EngineError:
            raise
        except Exception:
            logger.exception("%s: unexpected", name_of(record))
            if record.state is not VersionState.VALIDATING:
                raise
            refusal = AdapterNotChecked(record.adapter, [INTERNAL_FINDING])
            await self._refuse(record, refusal)
            return refusal

    def _end_work(self, name: tuple[VersionKey, VersionState], task: asyncio.Task[Refusal]) -> None:
        del self._work[name]
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("%s: left for later: %s", name[0], error)

    async def _surely(self, work: Coroutine[Any, Any, VersionRecord]) -> VersionRecord:
        """Do `work` to its end, also if its caller leaves."""
        task = asyncio.create_task(work)
        self._begun.add(task)
        task.add_done_callback(self._begun.discard)
        return await asyncio.shield(task)
