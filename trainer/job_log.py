"""What the training processes of a job printed: the logs of its attempts, one after another."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass

from store.job_records import JobRecord
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


async def log_pieces(
    look: Callable[[], Awaitable[JobRecord]], folder: JobFolder, *, offset: int, follow: bool
) -> AsyncGenerator[LogPiece, None]:
    """The log from an offset; with `follow`, until the job has ended. Raises what `look` does.

    `look` tells the job as it stands.
    """
    while True:
        job = await look()  # before the read: what a job that has ended printed is there
        while data := await asyncio.to_thread(_read, folder, job.attempt, offset):
            yield LogPiece(offset, data)
            offset += len(data)
        if not follow or job.state.is_final:
            return
        await asyncio.sleep(FOLLOW_INTERVAL_S)


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
