"""What jobs saved: listed, and published at the wish of their owners."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

from store.job_records import EventKind, JobChange, JobRecord, JobUnknown, NewEvent
from trainer.errors import CheckpointUnknown, GateRejected
from trainer.events import Checkpoint, Publication, PublicationState
from trainer.ingest import as_json
from trainer.job_folder import JobFolder
from trainer.means import Means
from trainer.spec import JobSpec, PublishSpec

EVENTS_PER_READ = 1000


class JobCheckpoints:
    """Of all jobs of one gateway."""

    def __init__(self, means: Means) -> None:
        self._means = means

    async def of_job(self, tenant: str, name: str) -> list[Checkpoint]:
        """What a job has saved and is still there, newest first. Raises JobUnknown."""
        job = await self._means.store.job(tenant, name)
        return [checkpoint for checkpoint, _ in await self.saved(job)]

    async def saved(self, job: JobRecord) -> list[tuple[Checkpoint, Path]]:
        """The same of a job, each with its folder."""
        told: dict[str, Checkpoint] = {}
        after = 0
        while events := await self._means.store.job_events(
            job.tenant,
            job.name,
            after=after,
            limit=EVENTS_PER_READ,
            uid=job.uid,
            kinds=[EventKind.CHECKPOINT],
        ):
            after = events[-1].sequence
            for event in events:
                checkpoint = Checkpoint.model_validate(event.payload)
                told[checkpoint.folder] = checkpoint  # saved again: the later one is there
        folder = JobFolder(self._means.folder / job.uid)

        def there() -> list[tuple[Checkpoint, Path]]:
            found = [(checkpoint, folder.checkpoint(checkpoint)) for checkpoint in told.values()]
            return [(checkpoint, path) for checkpoint, path in found if path is not None]

        return (await asyncio.to_thread(there))[::-1]

    async def publish(
        self,
        tenant: str,
        name: str,
        step: int | None,
        adapter: str,
        publish: PublishSpec | None,
    ) -> Publication:
        """Make one checkpoint a version; see `Jobs.publish_checkpoint`."""
        job = await self._means.store.job(tenant, name)
        saved = await self.saved(job)
        if step is not None:
            saved = [entry for entry in saved if entry[0].step == step]
        if not saved:
            raise CheckpointUnknown(name, step)
        checkpoint, path = saved[0]
        effective = JobSpec.model_validate(job.effective_spec)
        wanted = publish or effective.publish or PublishSpec()
        publication = await self._means.publisher.publish(job, path, adapter or job.adapter, wanted)
        if publication.adapter == job.adapter:
            await self._means.journal.surely(self._note(job, publication))
        if publication.state is PublicationState.REJECTED:
            raise GateRejected(name, checkpoint.step, publication)
        return publication

    async def _note(self, seen: JobRecord, publication: Publication) -> None:
        """Tell of it in a job that has ended without an adapter that serves."""
        with contextlib.suppress(JobUnknown):
            job = await self._means.store.job(seen.tenant, seen.name)
            before = Publication.model_validate(job.publication)
            told = as_json(publication)
            if (
                job.uid == seen.uid
                and job.state.is_final
                and before.state is not PublicationState.SERVING
                and before != publication
            ):
                change = JobChange(publication=told, events=[NewEvent(EventKind.PUBLICATION, told)])
                await self._means.journal.change(job, change)
