"""Writes what happens in a run to its event file, for the host to read."""

from __future__ import annotations

import os
import time
from pathlib import Path

from trainer.events import Checkpoint, Notice, Progress, WorkerEvent, WorkerEventKind
from trainer.spec import JobSpec


class EventWriter:
    """Appends one line an event, whole or with an error. For one thread.

    Raises OSError if the disk takes no more.
    """

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        self._sequence = 0

    def loaded(self, effective: JobSpec) -> None:
        """The first step begins."""
        self._write(WorkerEventKind.LOADED, effective)

    def progress(self, progress: Progress) -> None:
        """A step has ended, or an evaluation."""
        self._write(WorkerEventKind.PROGRESS, progress)

    def checkpoint(self, checkpoint: Checkpoint) -> None:
        """One is whole on disk."""
        self._write(WorkerEventKind.CHECKPOINT, checkpoint)

    def notice(self, notice: Notice) -> None:
        """Something was changed, or is to be known."""
        self._write(WorkerEventKind.NOTICE, notice)

    def close(self) -> None:
        os.close(self._file)

    def _write(
        self, kind: WorkerEventKind, payload: JobSpec | Progress | Checkpoint | Notice
    ) -> None:
        self._sequence += 1
        event = WorkerEvent(
            sequence=self._sequence,
            time_ns=time.time_ns(),
            kind=kind,
            payload=payload.model_dump(mode="json"),
        )
        left = event.model_dump_json().encode() + b"\n"
        # A full disk takes a part of a line first, and only then says that it is full.
        while left:
            left = left[os.write(self._file, left) :]
