"""What becomes of a job's adapter once it is trained: it is published, whatever comes of that."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

from store.job_records import EventKind, JobChange, JobRecord, NewEvent
from trainer.events import Manifest, Publication, PublicationState
from trainer.ingest import as_json
from trainer.job_folder import JobFolder
from trainer.means import Means
from trainer.spec import JobSpec, PublishSpec

logger = logging.getLogger(__name__)

PUBLISHED = {PublicationState.SERVING, PublicationState.REJECTED, PublicationState.FAILED}


class JobPublishing:
    """Of one job. Owned by its run."""

    def __init__(self, uid: str, means: Means) -> None:
        self._means = means
        self._folder = JobFolder(means.folder / uid)
        self._published: Publication | None = None
        """What became of the adapter, if the store may not know it yet."""

    async def publish(self, job: JobRecord) -> JobRecord:
        """Publish what is trained, and tell it."""
        publish = JobSpec.model_validate(job.effective_spec).publish
        publication = Publication.model_validate(job.publication)
        if publish is None or publication.state in PUBLISHED:
            return job
        gating = publication.model_copy(update={"state": PublicationState.GATING})
        job = await self._tell(job, gating)
        assert job.manifest is not None
        checkpoint = Manifest.model_validate(job.manifest).checkpoint
        folder = await asyncio.to_thread(self._folder.checkpoint, checkpoint)
        if folder is None:
            publication = _unpublished(job, "its checkpoint is gone or damaged")
        else:
            self._published = publication = await self._try(job, folder, publish)
        return await self._tell(job, publication)

    async def give_up(self, job: JobRecord) -> JobRecord:
        """Tell what became of it, of a job that was cancelled meanwhile."""
        if Publication.model_validate(job.publication).state is not PublicationState.GATING:
            return job
        return await self._tell(job, self._published or _unpublished(job, "the job was cancelled"))

    async def _try(self, job: JobRecord, folder: Path, publish: PublishSpec) -> Publication:
        try:
            return await self._means.publisher.publish(job, folder, job.adapter, publish)
        except Exception:
            logger.exception("job %s cannot be published", job.name)
            return _unpublished(job, "the gateway failed to publish it, and logged why")

    async def _tell(self, job: JobRecord, publication: Publication) -> JobRecord:
        told = as_json(publication)
        change = JobChange(publication=told, events=[NewEvent(EventKind.PUBLICATION, told)])
        return await self._means.journal.change(job, change)


def _unpublished(job: JobRecord, why: str) -> Publication:
    """The publication of an adapter that could not be published."""
    return Publication(
        state=PublicationState.FAILED,
        adapter=job.adapter,
        reasons=(f"{why}; PublishCheckpoint tries again",),
    )
