"""Reads what a training process writes of its run, from where it was read to before.

A line counts once it is whole: what a process was cut off in the middle of is never read.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ValidationError

from trainer.events import Checkpoint, Notice, Progress, WorkerEvent, WorkerEventKind
from trainer.spec import JobSpec

BYTES_PER_READ = 1024**2
"""Read at once; also the longest line that is taken."""

Payload = JobSpec | Progress | Checkpoint | Notice

PAYLOADS: dict[WorkerEventKind, type[JobSpec | Progress | Checkpoint | Notice]] = {
    WorkerEventKind.LOADED: JobSpec,
    WorkerEventKind.PROGRESS: Progress,
    WorkerEventKind.CHECKPOINT: Checkpoint,
    WorkerEventKind.NOTICE: Notice,
}


@dataclass(frozen=True, slots=True)
class Line:
    """One line that was read."""

    end: int
    """Offset of the byte after it."""
    event: WorkerEvent | None
    """None: it is none."""
    payload: BaseModel | None


def read_events(path: Path, offset: int) -> list[Line]:
    """The whole lines from an offset on, as many as are read at once; [] if there is none.

    Blocks on the disk. A file that is not there is empty.
    """
    try:
        with path.open("rb") as file:
            file.seek(offset)
            data = file.read(BYTES_PER_READ)
    except FileNotFoundError:
        return []
    whole = data[: data.rfind(b"\n") + 1]
    if not whole and len(data) == BYTES_PER_READ:  # no event is that long: let go of it
        return [Line(offset + len(data), None, None)]
    lines = []
    for text in whole.splitlines(keepends=True):
        offset += len(text)
        lines.append(_line(offset, text))
    return lines


def _line(end: int, text: bytes) -> Line:
    try:
        event = WorkerEvent.model_validate_json(text)
        return Line(end, event, PAYLOADS[event.kind].model_validate(event.payload))
    except ValidationError:
        return Line(end, None, None)
