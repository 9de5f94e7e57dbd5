"""What becomes of uploads that nobody needs any more."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sqlite3
from collections.abc import Awaitable, Callable

from engine.intake import UPLOAD_SCHEME
from store.records import VersionState
from store.registry import Registry
from store.upload_folder import StorageFull
from store.uploads import UploadBusy, UploadStore

logger = logging.getLogger(__name__)

SWEEP_INTERVAL_S = 3600.0
"""How often uploads that nobody went on with are dropped."""


class UploadSweep:
    """Drops them every hour. The control plane runs it."""

    def __init__(
        self,
        uploads: UploadStore,
        registry: Registry,
        sweep_datasets: Callable[[], Awaitable[None]],
    ) -> None:
        """`sweep_datasets` does the same for uploads of datasets."""
        self._uploads = uploads
        self._registry = registry
        self._sweep_datasets = sweep_datasets

    async def run(self) -> None:
        """Sweep now and then, until cancelled."""
        while True:
            try:
                await self.sweep()
            except (OSError, sqlite3.Error, StorageFull):  # no reason to end with it
                logger.exception("uploads cannot be swept; trying again later")
            await asyncio.sleep(SWEEP_INTERVAL_S)

    async def sweep(self) -> None:
        """Drop uploads that nobody went on with, and complete ones that no version needs."""
        await asyncio.to_thread(self._uploads.sweep)
        await self._sweep_datasets()
        for tenant, upload_id, is_old in await asyncio.to_thread(self._uploads.complete):
            made = await self._registry.version_of_request(tenant, UPLOAD_SCHEME + upload_id)
            if is_old if made is None else made.state is not VersionState.VALIDATING:
                with contextlib.suppress(UploadBusy):
                    await asyncio.to_thread(self._uploads.drop, tenant, upload_id)
                    logger.info("dropped upload %s of %s: no version needs it", upload_id, tenant)
