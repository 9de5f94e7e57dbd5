"""The seam to the engine: what jobs need of the running server, which only the gateway has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from store.job_records import JobRecord
from trainer.events import Publication
from trainer.spec import JobSpec, PublishSpec


@dataclass(frozen=True, slots=True)
class Finding:
    """Why the server could not serve what a job would train, and what to do."""

    field: str
    """As the contract has it, for example `spec.lora.r`."""
    text: str


class Publisher(Protocol):
    """What jobs ask of the server that they publish into."""

    def findings(self, spec: JobSpec) -> Sequence[Finding]:
        """Why what this resolved spec trains could not be served; empty if it could."""

    async def publish(
        self, job: JobRecord, checkpoint: Path, adapter: str, publish: PublishSpec
    ) -> Publication:
        """Pass a checkpoint through the gate, and make it a version with traffic.

        Idempotent by job and checkpoint: again, it goes on or tells what became of it. A gate
        that says no answers REJECTED, and what could not be done FAILED. Cancelled, it leaves
        no version that nobody checked.
        """
