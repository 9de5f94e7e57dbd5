"""From the event file of a training process into the store: what a batch of lines changes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import BaseModel

from store.job_records import EventKind, JobChange, JobRecord, JobState, NewEvent
from trainer.event_file import Line
from trainer.events import Notice, Progress
from trainer.spec import JobSpec

UNREADABLE = Notice(
    code="EVENT_UNREADABLE",
    message="the training process wrote an event that cannot be read; it was left out",
)


def changes(job: JobRecord, lines: Sequence[Line]) -> Iterator[JobChange]:
    """What these lines change of a job as it stands: one change, or two.

    The second begins with the line that says that the model is loaded, so that events keep
    their order: a change of state comes first in its change.
    """
    loaded = next((at for at, line in enumerate(lines) if isinstance(line.payload, JobSpec)), 0)
    progress = job.progress
    for part in (lines[:loaded], lines[loaded:]):
        if part:
            progress = _progress(progress, part)
            yield _change(job, progress, part)


def _progress(
    progress: Mapping[str, Any] | None, lines: Sequence[Line]
) -> Mapping[str, Any] | None:
    """Where the run stands after these lines: what is told last, and what was measured last. A run
    ends with an evaluation, and finished jobs were listed without a loss."""
    stands = None if progress is None else Progress.model_validate(progress)
    for line in lines:
        if isinstance(line.payload, Progress):
            stands = line.payload.after(stands)
    return None if stands is None else as_json(stands)


def _change(job: JobRecord, progress: Mapping[str, Any] | None, lines: Sequence[Line]) -> JobChange:
    runs = next((line.payload for line in lines if isinstance(line.payload, JobSpec)), None)
    notices = [line.payload for line in lines if isinstance(line.payload, Notice)]
    if any(line.event is None for line in lines):
        notices.append(UNREADABLE)
    return JobChange(
        state=JobState.RUNNING if runs is not None and job.state is JobState.PREPARING else None,
        effective_spec=None if runs is None else as_json(runs),
        ingested_bytes=lines[-1].end,
        progress=progress,
        # Each attempt says again what the device does otherwise.
        notices=[told for told in map(as_json, notices) if told not in job.notices],
        events=list(_events(lines)),
    )


def _events(lines: Sequence[Line]) -> Iterator[NewEvent]:
    told = False
    for line in lines:
        if line.event is None or line.payload is None:
            if not told:  # once a batch: a file of rubbish is no reason for a thousand events
                told = True
                yield NewEvent(EventKind.NOTICE, as_json(UNREADABLE))
        elif (kind := line.event.kind.kept_as) is not None:
            yield NewEvent(kind, as_json(line.payload), line.event.time_ns)


def as_json(content: BaseModel) -> dict[str, Any]:
    """As the store takes it: numbers that JSON does not have (NaN) are null."""
    value: dict[str, Any] = json.loads(content.model_dump_json())
    return value
