"""How training does at one moment: jobs by state, and the process that is silent for longest."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from store.job_records import HAS_PROCESS, JobState
from store.jobs import JobStore
from trainer.job_folder import JobFolder


@dataclass(frozen=True, slots=True)
class Pulse:
    """Of all jobs of all tenants."""

    jobs: Mapping[JobState, int]
    """How many there are, of every state."""
    silent_s: float
    """Since a training process last showed that it lives, of the one for which that is longest;
    0 where none runs."""


async def take_pulse(store: JobStore, folder: Path) -> Pulse:
    """The pulse now. `folder` has the folders of all jobs."""
    tally = await store.tally()
    running = [
        JobFolder(folder / uid).run(attempt).alive
        for uid, state, attempt in tally.active
        if state in HAS_PROCESS
    ]
    return Pulse(tally.counts, await asyncio.to_thread(_longest_silence_s, running))


def _longest_silence_s(signs: Sequence[Path]) -> float:
    now_s, longest_s = time.time(), 0.0
    for sign in signs:
        try:
            longest_s = max(longest_s, now_s - sign.stat().st_mtime)
        except FileNotFoundError:  # a process that has just been started
            continue
    return longest_s
