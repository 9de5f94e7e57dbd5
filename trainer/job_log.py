"""What the training processes of a job printed: the logs of its attempts, one after another."""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from dataclasses import dataclass

from store.job_records import JobRecord
from store.shared_reads import SharedReads
from trainer.job_folder import JobFolder

BYTES_PER_PIECE = 64 * 1024
FOLLOW_INTERVAL_S = 0.25
"""How often is looked for something new."""


@dataclass(frozen=True, slots=True)
class LogPiece:
    """A piece of the log."""

    offset: int
    """Of its first byte, in the logs of all attempts together."""
    data: bytes


class Logs:
    """Reads logs. One that is followed is looked at once for all who follow it: each for itself,
    1,000 of them took a third of a core while nothing was printed."""

    def __init__(self) -> None:
        self._tails: dict[str, _Tail] = {}
        """By uid of the job."""

    async def pieces(
        self,
        look: Callable[[], Awaitable[JobRecord]],
        folder: JobFolder,
        *,
        offset: int,
        follow: bool,
    ) -> AsyncGenerator[LogPiece, None]:
        """The log from an offset; with `follow`, until the job has ended. Raises what `look` does.

        `look` tells the job as it stands.
        """
        job = await look()
        if not follow:
            while data := await asyncio.to_thread(_read, folder, job.attempt, offset):
                yield LogPiece(offset, data)
                offset += len(data)
            return
        with self._followed(job.uid, look, folder) as tail:
            while True:
                changed, job = tail.changed, tail.job or job  # before the read
                while data := await tail.read(changed, job.attempt, offset):
                    yield LogPiece(offset, data)
                    offset += len(data)
                if tail.is_whole(job):
                    return
                await changed.wait()
                if tail.error is not None:
                    raise tail.error.with_traceback(None)

    @contextlib.contextmanager
    def _followed(
        self, uid: str, look: Callable[[], Awaitable[JobRecord]], folder: JobFolder
    ) -> Iterator[_Tail]:
        tail = self._tails.get(uid)
        if tail is None or tail.error is not None:
            tail = self._tails[uid] = _Tail(look, folder)
        tail.followers += 1
        try:
            yield tail
        finally:
            tail.followers -= 1
            if not tail.followers:
                tail.close()
                if self._tails.get(uid) is tail:
                    del self._tails[uid]


class _Tail:
    """The end of one log that is followed."""

    def __init__(self, look: Callable[[], Awaitable[JobRecord]], folder: JobFolder) -> None:
        self._look = look
        self._folder = folder
        self._reads = SharedReads()
        self.followers = 0
        self.changed = asyncio.Event()
        """Set when there is more to read, or no more to come; replaced then."""
        self.job: JobRecord | None = None
        """As it was looked at last."""
        self.error: Exception | None = None
        """Why it is looked at no more."""
        self._looking = asyncio.create_task(self._watch())

    def is_whole(self, job: JobRecord) -> bool:
        """Whether what was there after this job was looked at is all of the log."""
        return job is self.job and job.state.is_final

    async def read(self, changed: asyncio.Event, attempts: int, offset: int) -> bytes:
        """A piece, read once for all who wait at the same place; empty: there is none."""
        return await self._reads.read(
            (changed, attempts, offset),
            functools.partial(asyncio.to_thread, _read, self._folder, attempts, offset),
        )

    def close(self) -> None:
        """Look no more."""
        self._looking.cancel()

    async def _watch(self) -> None:
        seen: tuple[int, int, bool] | None = None
        try:
            while True:
                job = (
                    await self._look()
                )  # before the file: what a job that has ended printed is there
                size_bytes = await asyncio.to_thread(_size_bytes, self._folder, job.attempt)
                self.job = job
                now = (job.attempt, size_bytes, job.state.is_final)
                if now != seen:
                    seen = now
                    self._wake()
                if job.state.is_final:
                    return
                await asyncio.sleep(FOLLOW_INTERVAL_S)
        except Exception as error:  # told to all who follow
            self.error = error
            self._wake()

    def _wake(self) -> None:
        changed, self.changed = self.changed, asyncio.Event()
        changed.set()


def _size_bytes(folder: JobFolder, attempts: int) -> int:
    """Of the logs of all attempts."""
    size_bytes = 0
    for attempt in range(1, attempts + 1):
        with contextlib.suppress(FileNotFoundError):  # it was not started
            size_bytes += folder.run(attempt).log.stat().st_size
    return size_bytes


def _read(folder: JobFolder, attempts: int, offset: int) -> bytes:
    for attempt in range(1, attempts + 1):
        try:
            with folder.run(attempt).log.open("rb") as log:
                size_bytes = log.seek(0, 2)
                if offset < size_bytes:
                    log.seek(offset)
                    return log.read(BYTES_PER_PIECE)
                offset -= size_bytes
        except FileNotFoundError:
            continue  # it was not started
    return b""
