"""The owner of a state folder, as the gateway's host is: lock, registry, jobs, adapter files."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

from store.artifacts import CONFIG_FILE, WEIGHTS_FILE, Artifact, ArtifactStore
from store.sqlite_jobs import SqliteJobs
from store.sqlite_registry import SqliteRegistry
from store.state_folder import StateFolder

ONE, TWO = "one", "two"
"""The folders that `write_sources` makes."""
CLOCK_STEP_NS = 1_000_000


class Host:
    """Owns the state folder `<watched>/state`. Its clock counts, so equal runs are equal."""

    def __init__(self, watched: Path, sources: Path) -> None:
        self.state_path = watched / "state"
        self.database = self.state_path / "registry.sqlite"
        self.registry: SqliteRegistry
        self.jobs: SqliteJobs
        self.artifacts: ArtifactStore
        self.kept: dict[str, Artifact] = {}
        """By source, what `keep` answered."""
        self._sources = sources
        self._clock = itertools.count(CLOCK_STEP_NS, CLOCK_STEP_NS)
        self._uids = itertools.count(1)
        self._owned = contextlib.AsyncExitStack()

    async def open(self) -> None:
        """Take the folder, in the order in which the gateway does."""
        self._owned.enter_context(StateFolder(self.state_path))
        self.registry = await self._owned.enter_async_context(
            SqliteRegistry(self.database, clock_ns=lambda: next(self._clock))
        )
        self.jobs = await self._owned.enter_async_context(
            SqliteJobs(
                self.database,
                clock_ns=lambda: next(self._clock),
                make_uid=lambda: f"{next(self._uids):032x}",
            )
        )
        self.artifacts = ArtifactStore(self.state_path)

    async def close(self) -> None:
        """As at an orderly end. Safe to call twice."""
        await self._owned.aclose()

    def keep(self, source: str) -> Artifact:
        """Take in the files of ONE or TWO."""
        with self.artifacts.stage(self._sources / source) as staged:
            self.kept[source] = staged.commit()
        return self.kept[source]


@dataclass(frozen=True, slots=True)
class Operation:
    """One thing that a host does."""

    name: str
    run: Callable[[Host], Awaitable[object]]
    """Answers with what the caller would be told."""


def write_sources(folder: Path) -> None:
    """Two adapters to take in, small and of different bytes."""
    for name in (ONE, TWO):
        (folder / name).mkdir(parents=True)
        (folder / name / CONFIG_FILE).write_text('{"r": 8}')
        (folder / name / WEIGHTS_FILE).write_bytes(name.encode() * 700)
