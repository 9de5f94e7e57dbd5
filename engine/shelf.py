"""The shelf: stored adapter files, which versions with equal bytes share."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, TypeVar

from store.artifacts import Artifact, ArtifactStore, StagedArtifact
from store.registry import Registry

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Shelf:
    """Keeps files while a version has them, or is about to. Of one event loop."""

    def __init__(self, store: ArtifactStore, registry: Registry) -> None:
        self._store = store
        self._registry = registry
        self._kept: Counter[str] = Counter()
        """Digests that are relied on, and of which the registry does not know yet."""
        self._turn = asyncio.Lock()
        """Held while files are put up or taken down."""

    @contextlib.asynccontextmanager
    async def keeping(self, staged: StagedArtifact) -> AsyncIterator[Artifact]:
        """Put the files up; at the end of the block they stay if a version has them.

        Raises ArtifactDamaged, and OSError if the disk fails or is full.
        """
        digest = staged.digest
        async with self._turn:
            artifact = await to_its_end(staged.commit)
            self._kept[digest] += 1
        try:
            yield artifact
        finally:
            self._kept[digest] -= 1

    async def remove_unused(self, digest: str) -> None:
        """Take the files down if no version has them."""
        async with self._turn:
            if not self._kept[digest] and not await self._registry.digest_in_use(digest):
                await to_its_end(lambda: self._store.remove(digest))

    async def sweep(self) -> None:
        """Take down what a crash left to no version."""
        for digest in await asyncio.to_thread(self._store.digests):
            await self.remove_unused(digest)

    async def verified(self, digest: str) -> Artifact:
        """Stored files, to be loaded now. Raises ArtifactDamaged."""
        return await asyncio.to_thread(self._store.open_verified, digest)


async def to_its_end(work: Callable[[], T]) -> T:
    """Do in a thread what must not be left half done, also if we are cancelled."""
    return await finished(asyncio.to_thread(work))


async def finished(work: Coroutine[Any, Any, T]) -> T:
    """Do `work` to its end before a cancellation takes effect."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        while not task.done():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait((task,))
        raise
