"""Datasets: uploaded once, kept by content, named by tenants.

    upload (resumable) -> file by its SHA-256 -> record

The record is written last, so a dataset that is listed is whole. What a crash leaves without a
record is swept at the next start.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from pathlib import Path

from store.datasets import DatasetFiles
from store.job_records import DatasetExists, DatasetRecord, DatasetUnknown
from store.jobs import JobStore
from store.upload_folder import DatasetPlan
from store.uploads import UploadBusy, UploadStore
from trainer.prepared_folders import PreparedFolders
from trainer.to_the_end import to_the_end

logger = logging.getLogger(__name__)


class Datasets:
    """All datasets of one gateway."""

    def __init__(
        self, store: JobStore, files: DatasetFiles, uploads: UploadStore, prepared: PreparedFolders
    ) -> None:
        """`prepared` has the rows that were made of datasets, which go with them."""
        self._store = store
        self._files = files
        self._prepared = prepared
        self.uploads = uploads
        self._changing = asyncio.Lock()
        """One is kept or removed at a time: a file goes only when no record wants it."""

    async def open(self) -> None:
        """Sweep what a crash left over. Before anything else."""
        in_use = await self._store.dataset_digests()
        await asyncio.to_thread(self._files.sweep, in_use)
        await asyncio.to_thread(self._prepared.keep_only, in_use)

    async def find(self, tenant: str, name: str) -> DatasetRecord | None:
        """The dataset; None if there is none."""
        try:
            return await self._store.dataset(tenant, name)
        except DatasetUnknown:
            return None

    async def expected(self, tenant: str, plan: DatasetPlan) -> DatasetRecord | None:
        """The dataset that an upload would become, if it is there.

        Raises DatasetExists if its name has other bytes, or a format that is not the one asked
        for.
        """
        found = await self.find(tenant, plan.dataset)
        if found is not None and not found.is_what(plan.sha256, plan.format):
            raise DatasetExists(plan.dataset)
        return found

    async def keep(self, tenant: str, plan: DatasetPlan) -> DatasetRecord:
        """Make a complete upload a dataset. Raises DatasetExists, UploadIncomplete, StorageFull."""
        async with self._changing:
            record = await to_the_end(self._keep(tenant, plan))
        with contextlib.suppress(UploadBusy, OSError):  # else it is swept
            await asyncio.to_thread(self.uploads.drop, tenant, plan.upload_id)
        return record

    async def remove(self, tenant: str, name: str) -> None:
        """Forget a dataset. Raises DatasetUnknown, DatasetInUse."""
        async with self._changing:
            await to_the_end(self._remove(tenant, name))
        logger.info("deleted dataset %s of %s", name, tenant)

    def path(self, record: DatasetRecord) -> Path:
        """Its file."""
        return self._files.path(record.sha256)

    async def sweep_uploads(self) -> None:
        """Drop uploads that nobody went on with, and complete ones that became no dataset."""
        await asyncio.to_thread(self.uploads.sweep)
        for tenant, upload_id, is_old in await asyncio.to_thread(self.uploads.complete):
            if is_old:
                with contextlib.suppress(UploadBusy):
                    await asyncio.to_thread(self.uploads.drop, tenant, upload_id)
                    logger.info("dropped upload %s of %s: nobody fetched it", upload_id, tenant)

    async def _keep(self, tenant: str, plan: DatasetPlan) -> DatasetRecord:
        uploaded = await asyncio.to_thread(self.uploads.file, tenant, plan.upload_id)
        await asyncio.to_thread(self._files.keep, uploaded, plan.sha256)
        return await self._store.add_dataset(
            tenant,
            plan.dataset,
            sha256=plan.sha256,
            size_bytes=plan.size_bytes,
            format=plan.format,
        )

    async def _remove(self, tenant: str, name: str) -> None:
        sha256 = (await self._store.dataset(tenant, name)).sha256
        if await self._store.remove_dataset(tenant, name):
            # No record has these bytes, so no job that runs does.
            await asyncio.to_thread(self._files.remove, sha256)
            await asyncio.to_thread(self._prepared.remove_dataset, sha256)
