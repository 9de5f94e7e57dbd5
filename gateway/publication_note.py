"""What is noted of a publication, in a file with its checkpoint.

    limits    before there is a version, so that a version that a crash interrupted is held to them
    report    before the version is READY, so that nobody has to measure again
    refusal   after it FAILED for what it is, so that the same question has the same answer

Each try to publish a checkpoint as a version of an adapter is a version of its own, because the
registry never takes a FAILED one up again.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from trainer.events import GateReport
from trainer.run_folder import write_whole
from trainer.spec import GateSpec


class PublicationNote(BaseModel):
    """The last try to publish one checkpoint as a version of one adapter."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    number: int
    """Of the try, from 1 up."""
    limits: GateSpec
    """Resolved."""
    report: GateReport | None = None
    """What the gate measured; None: it was not asked yet, or measured no numbers."""
    refusal: tuple[str, ...] = ()
    """Why the adapter was refused, where that was its own fault."""


def note_path(checkpoint: Path, adapter: str) -> Path:
    """Where it is kept: beside the checkpoint's folder, whose files its manifest lists."""
    return checkpoint.with_name(f"{checkpoint.name}.{adapter}.publication.json")


def read_note(checkpoint: Path, adapter: str) -> PublicationNote | None:
    """The note; None if there is none that can be read. Raises OSError if the disk fails."""
    try:
        return PublicationNote.model_validate_json(note_path(checkpoint, adapter).read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValidationError):
        return None


def write_note(checkpoint: Path, adapter: str, note: PublicationNote) -> None:
    """Keep a note, durably. Raises OSError."""
    write_whole(note_path(checkpoint, adapter), note)
