"""Tells a training process that hangs from one that takes its time.

A thread of the process shows every other second that it is not stopped; that its main thread
gets on, it shows after each micro-batch. A process that trains and does not get on for the timeout
hangs, or for several times the longest that it ever took, if that is longer: steps of a large model
on a busy CPU take minutes. One that loads shows nothing but that it is not stopped; it has a limit
of its own for all of it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from trainer.run_folder import RunFolder

DEFAULT_TIMEOUT_S = 300.0
LOADING_S = 3600.0
"""How long a process may take to load; also to compile, quantize, and try out what fits."""
TIMES_LONGEST = 5.0
MOST_AT_ONCE_S = 5.0
"""That counts between two looks. If we were stopped ourselves, so was what we look at, mostly."""


@dataclass(frozen=True, slots=True)
class Signs:
    """What a process shows of itself; a file that is not there is 0."""

    alive_ns: int
    progress_ns: int
    events_bytes: int


def signs(run: RunFolder) -> Signs:
    """What there is now. Blocks on the disk. Raises OSError if it cannot be looked at."""
    alive, progress, events = (_stat(path) for path in (run.alive, run.progress, run.events))
    return Signs(
        alive_ns=alive.st_mtime_ns if alive else 0,
        progress_ns=progress.st_mtime_ns if progress else 0,
        events_bytes=events.st_size if events else 0,
    )


def _stat(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except FileNotFoundError:
        return None


class Watchdog:
    """Of one attempt, as long as one host follows it."""

    def __init__(self, timeout_s: float, clock_s: Callable[[], float] = time.monotonic) -> None:
        self._timeout_s = timeout_s
        self._clock_s = clock_s
        self._looked_s: float | None = None
        self._seen: Signs | None = None
        self._loading_s = self._stopped_s = self._idle_s = self._longest_s = 0.0

    def look(self, found: Signs) -> str | None:
        """Take in what the process shows now: in what way it hangs, in words that follow its
        name; None: it does not."""
        now_s = self._clock_s()
        passed_s = 0.0 if self._looked_s is None else min(now_s - self._looked_s, MOST_AT_ONCE_S)
        before, self._looked_s, self._seen = self._seen, now_s, found
        if found.progress_ns:
            return self._training(before, found, passed_s)
        return self._loading(before, found, passed_s)

    def _training(self, before: Signs | None, found: Signs, passed_s: float) -> str | None:
        got_on = before is None or (before.progress_ns, before.events_bytes) != (
            found.progress_ns,
            found.events_bytes,
        )
        self._idle_s += passed_s
        if got_on:
            self._longest_s = max(self._longest_s, self._idle_s)
            self._idle_s = 0.0
        limit_s = max(self._timeout_s, TIMES_LONGEST * self._longest_s)
        return f"did not get on for {limit_s:.0f} s" if self._idle_s > limit_s else None

    def _loading(self, before: Signs | None, found: Signs, passed_s: float) -> str | None:
        self._loading_s += passed_s
        self._stopped_s += passed_s
        if before is None or before.alive_ns != found.alive_ns:
            self._stopped_s = 0.0
        if self._stopped_s > self._timeout_s:
            return f"showed no sign of life for {self._timeout_s:.0f} s while it loaded"
        if self._loading_s > max(LOADING_S, self._timeout_s):
            return f"had not loaded after {self._loading_s:.0f} s"
        return None
