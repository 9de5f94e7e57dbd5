"""Where crashes are made: by SIGKILL in a child, or by a power cut in a recording."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.store.crash.disk import Disk, Image, Survival, read_image, write_image
from tests.store.crash.host import write_sources
from tests.store.crash.journal import Entry, Op, read_journal
from tests.store.crash.order import Order
from tests.store.crash.script import Script
from tests.store.crash.verdict import Expectation, expect, judge
from tests.store.crash.victim import Victim


@dataclass(frozen=True, slots=True)
class Recording:
    """A run of a script in a child that nothing interrupts."""

    expected: Expectation
    before: Image
    """What lay in the watched folder at first, synced."""
    journal: Sequence[Entry]
    after: Image
    """What lay there at the end."""

    @property
    def kill_points(self) -> range:
        """Numbers of the calls that change something."""
        return range(1, max(entry.call for entry in self.journal) + 1)

    @property
    def writes(self) -> list[int]:
        """Those that write bytes."""
        return [entry.call for entry in self.journal if entry.op is Op.WRITE]


@dataclass(frozen=True, slots=True)
class PowerCut:
    """A moment of a recording, and what it left."""

    kill_point: int
    """The call that was not made any more; one after the last at the end."""
    acknowledged: Sequence[str]
    image: Image


class CrashSite:
    """Runs scripts below one folder, crashes them and judges what is left."""

    def __init__(self, folder: Path, victim: Victim) -> None:
        self._folder = folder.resolve()
        self._victim = victim
        self.sources = self._folder / "sources"
        """Folder of the adapters to take in."""
        self._watched = self._folder / "watched"
        self._journal = self._folder / "journal"
        write_sources(self.sources)

    async def record(self, script: Script) -> Recording:
        """Learn what a run does, and what it should."""
        prepared = self._folder / f"{script.value}-before"
        prepared.mkdir()
        await script.prepare(prepared, self.sources)
        expected = await expect(script, self._folder / f"{script.value}-expected", self.sources)
        before = read_image(prepared)
        journal = self._run(script, before, kill_at=0, within=False, status=0)
        return Recording(expected, before, journal, read_image(self._watched))

    async def kill(self, recording: Recording, kill_point: int, *, within: bool) -> list[str]:
        """SIGKILL before a call, or with half of it written; what is wrong then."""
        script = recording.expected.script
        journal = self._run(
            script, recording.before, kill_at=kill_point, within=within, status=-signal.SIGKILL
        )
        return await judge(self._watched, self.sources, recording.expected, _notes(journal))

    async def restore(self, recording: Recording, cut: PowerCut) -> list[str]:
        """Start again from what a power cut left; what is wrong then."""
        self._put(cut.image)
        return await judge(self._watched, self.sources, recording.expected, cut.acknowledged)

    def _run(
        self, script: Script, before: Image, *, kill_at: int, within: bool, status: int
    ) -> list[Entry]:
        self._put(before)
        paths = str(self._watched), str(self.sources), str(self._journal)
        found = self._victim.run(Order(script.value, *paths, kill_at, within))
        if found != status:
            raise ChildProcessError(f"the run ended with {found}, and not {status}")
        return read_journal(self._journal)

    def _put(self, image: Image) -> None:
        for sealed in self._watched.glob("state/adapters/*"):
            sealed.chmod(0o700)
        shutil.rmtree(self._watched, ignore_errors=True)
        write_image(image, self._watched)


def power_cuts(recording: Recording, survival: Survival, draws: int = 1) -> Iterator[PowerCut]:
    """At each kill point and at the end: what so many draws left, if it is something new."""
    disk = Disk(recording.before)
    acknowledged: list[str] = []
    seen: list[Image] = []
    for entry in [*recording.journal, None]:
        if entry is None or entry.op is not Op.NOTE:
            kill_point = recording.kill_points.stop if entry is None else entry.call
            for draw in range(draws):
                image = disk.cut(survival, seed=kill_point * draws + draw)
                if image not in seen:
                    seen.append(image)
                    yield PowerCut(kill_point, tuple(acknowledged), image)
        if entry is not None:
            disk.apply(entry)
            if entry.op is Op.NOTE:
                acknowledged += _notes([entry])
                seen.clear()


def _notes(journal: Iterable[Entry]) -> list[str]:
    return [entry.data.decode() for entry in journal if entry.op is Op.NOTE]
