"""The intake: from wherever an adapter lies to a private copy that was checked.

    source -> staged copy -> findings, or facts

Only the copy is looked at, so nothing can change between the check and what is kept. No engine
sees any of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from engine.adapters import AdapterFacts, check_adapter
from engine.base_model import ModelFingerprints, ModuleShapes
from engine.errors import AdapterInvalid, AdapterNotChecked
from store.artifacts import ArtifactStore, SourceUnusable, StagedArtifact
from store.records import Content
from store.sources import AllowedSources, LocalFolder, RemoteFolder
from store.uploads import UploadIncomplete, UploadStore, UploadUnknown

logger = logging.getLogger(__name__)

UPLOAD_SCHEME = "upload:"
"""What stands before the id of an upload, where others have the URI of a source."""
MAX_AT_ONCE = 2
"""Adapters that are copied or checked at once: each takes a processor and a tensor's memory."""

GONE_FINDING = "the files that it is made of are gone or damaged: make it again"

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Announced:
    """What the caller says of an adapter, to be compared with what is there."""

    weights_sha256: str = ""
    """Empty: not compared."""
    fingerprints: Mapping[str, str] | None = None
    """Of the base model, by field names of ModelFingerprints; empty ones are not compared."""


@dataclass(frozen=True, slots=True)
class Inspected:
    """A staged copy that may be served, and what was learned of it."""

    staged: StagedArtifact
    facts: AdapterFacts

    @property
    def content(self) -> Content:
        """What the registry keeps of it."""
        return Content(
            digest=self.staged.digest,
            weights_sha256=self.staged.weights_sha256,
            size_bytes=self.staged.size_bytes,
            rank=self.facts.rank,
            target_modules=self.facts.target_modules,
        )


class Intake:
    """Stages and checks adapters for one base model."""

    def __init__(
        self,
        store: ArtifactStore,
        uploads: UploadStore,
        sources: AllowedSources,
        shapes: ModuleShapes,
        served: ModelFingerprints,
        *,
        max_lora_rank: int,
        dtype: str,
        folders: Mapping[str, Callable[[str], Path]] = {},
    ) -> None:
        """`shapes` are the base model's modules that an adapter may change, `dtype` is what it
        computes in.

        `folders` tells where adapters lie that we made ourselves, by what their URIs begin with;
        each is called with the rest of a URI, which callers of the gateway cannot choose.
        """
        self._store = store
        self._uploads = uploads
        self._sources = sources
        self._shapes = shapes
        self._served = asdict(served)
        self._max_lora_rank = max_lora_rank
        self._dtype = dtype
        self._own_folders = folders
        self._places = asyncio.Semaphore(MAX_AT_ONCE)

    def is_own(self, source_uri: str) -> bool:
        """Whether that is ours to read, as uploads are, and no place that a caller named."""
        return source_uri.startswith((UPLOAD_SCHEME, *self._own_folders))

    def check_source(self, adapter: str, source_uri: str) -> None:
        """Whether the gateway may read there. Looks at the text alone.

        Raises SourceNotAllowed, or AdapterInvalid if it is no source at all.
        """
        try:
            self._sources.resolve(source_uri)
        except SourceUnusable as error:
            raise AdapterInvalid(adapter, [str(error)]) from error

    @contextlib.asynccontextmanager
    async def inspect(
        self, tenant: str, adapter: str, source_uri: str, announced: Announced
    ) -> AsyncIterator[Inspected]:
        """Copy and check the adapter at an allowed URI, or at one that `is_own`. The copy is
        dropped at the end of the block unless it was committed.

        Raises AdapterInvalid with every finding, SourceNotAllowed, and OSError if our own disk
        fails or is full.
        """
        async with self._inspect(tenant, adapter, source_uri, announced) as inspected:
            yield inspected

    @contextlib.asynccontextmanager
    async def inspect_folder(self, adapter: str, folder: Path) -> AsyncIterator[Inspected]:
        """The same for a folder that the operator named, who may read anywhere."""
        async with self._inspect("", adapter, folder, Announced()) as inspected:
            yield inspected

    @contextlib.asynccontextmanager
    async def _inspect(
        self, tenant: str, adapter: str, source: str | Path, announced: Announced
    ) -> AsyncIterator[Inspected]:
        staging = await self._in_place(lambda: self._stage(tenant, adapter, source))
        try:
            staged = await asyncio.shield(staging)
        except asyncio.CancelledError:
            staging.add_done_callback(_drop)  # a thread cannot be cancelled
            raise
        with staged:
            checking = await self._in_place(lambda: self._check(adapter, staged, announced))
            yield await asyncio.shield(checking)

    async def _in_place(self, work: Callable[[], T]) -> asyncio.Future[T]:
        """Begin `work` in a thread once there is a place, which it keeps until it has ended,
        whoever waits for it or does not."""
        await self._places.acquire()
        running = in_daemon_thread(work)
        running.add_done_callback(self._leave_place)
        return running

    def _leave_place(self, ended: asyncio.Future[Any]) -> None:
        self._places.release()
        if not ended.cancelled():
            ended.exception()

    def _stage(self, tenant: str, adapter: str, source: str | Path) -> StagedArtifact:
        try:
            return self._store.stage(self._folder(tenant, source))
        except (SourceUnusable, UploadIncomplete, UploadUnknown) as error:
            if isinstance(source, str) and source.startswith(tuple(self._own_folders)):
                logger.error("%s: %s", source, error)  # which names folders of ours
                raise AdapterNotChecked(adapter, [GONE_FINDING]) from error
            raise AdapterInvalid(adapter, [str(error)]) from error

    def _folder(self, tenant: str, source: str | Path) -> Path | LocalFolder | RemoteFolder:
        if isinstance(source, Path):
            return source
        if source.startswith(UPLOAD_SCHEME):
            return self._uploads.path(tenant, source.removeprefix(UPLOAD_SCHEME))
        for scheme, folder in self._own_folders.items():
            if source.startswith(scheme):
                return folder(source.removeprefix(scheme))
        return self._sources.resolve(source)

    def _check(self, adapter: str, staged: StagedArtifact, announced: Announced) -> Inspected:
        findings = list(self._contradictions(staged, announced))
        try:
            facts = check_adapter(
                staged.path,
                adapter=adapter,
                shapes=self._shapes,
                max_lora_rank=self._max_lora_rank,
                dtype=self._dtype,
            )
        except AdapterInvalid as error:
            raise AdapterInvalid(adapter, [*findings, *error.findings]) from error
        if findings:
            raise AdapterInvalid(adapter, findings)
        return Inspected(staged, facts)

    def _contradictions(self, staged: StagedArtifact, announced: Announced) -> list[str]:
        findings = []
        if announced.weights_sha256 not in ("", staged.weights_sha256):
            findings.append(
                f"adapter_model.safetensors has the sha256 {staged.weights_sha256}, and "
                f"expected_sha256 is {announced.weights_sha256}: it is another file, or damaged"
            )
        for field, value in (announced.fingerprints or {}).items():
            if value and value != self._served[field]:
                findings.append(
                    f"fingerprints.{field} is {value}, and the served model's is "
                    f"{self._served[field] or 'none'}: train the adapter on the model that is "
                    "served (GetModel tells its fingerprints)"
                )
        return findings


def in_daemon_thread(function: Callable[[], T]) -> asyncio.Future[T]:
    """Run `function` in a thread that the exit of the process does not wait for: a source may
    be a server that does not answer."""
    loop = asyncio.get_running_loop()
    outcome: asyncio.Future[T] = loop.create_future()

    def settle(result: T | None, error: BaseException | None) -> None:
        if outcome.cancelled():
            return
        if error is not None:
            outcome.set_exception(error)
        else:
            outcome.set_result(result)  # type: ignore[arg-type]  # None only if T is

    def run() -> None:
        result, error = None, None
        try:
            result = function()
        except BaseException as caught:
            error = caught
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
            loop.call_soon_threadsafe(settle, result, error)

    threading.Thread(target=run, name="intake", daemon=True).start()
    return outcome


def _drop(staging: asyncio.Future[StagedArtifact]) -> None:
    if not staging.cancelled() and staging.exception() is None:
        staging.result().__exit__(None, None, None)
