"""A child process that somebody waits for, and that ends with them.

Not by the event loop's own means: uvloop forks, gRPC's fork handlers begin threads in the child,
and those crash when it becomes another program meanwhile. On two cores 7 % of the children died
of SIGSEGV. `subprocess` uses vfork, which runs no handlers, and takes about a millisecond.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
from collections.abc import AsyncIterator, Sequence
from typing import Any


@contextlib.asynccontextmanager
async def child_process(
    command: Sequence[str], **options: Any
) -> AsyncIterator[subprocess.Popen[bytes]]:
    """Run it in a session of its own, with options of `subprocess.Popen`. At the end of the block
    the session is killed, unless the process has ended. Raises OSError if it does not start.
    """
    child = _start(command, options)
    try:
        yield child
    finally:
        if child.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            await _reaped(child)
        for pipe in (child.stdin, child.stdout, child.stderr):
            if pipe is not None:
                pipe.close()


async def _reaped(child: subprocess.Popen[bytes]) -> None:
    """Wait for the end of a child that was killed, also if who waits is cancelled again: a second
    cancel would leave a process that nobody waits for, and its pipes."""
    reaping = asyncio.ensure_future(exit_code(child))
    cancelled: asyncio.CancelledError | None = None
    while not reaping.done():
        try:
            await asyncio.shield(reaping)
        except asyncio.CancelledError as error:
            cancelled = error
    reaping.result()
    if cancelled is not None:
        raise cancelled


def _start(command: Sequence[str], options: dict[str, Any]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(command, start_new_session=True, **options)


async def exit_code(child: subprocess.Popen[bytes]) -> int:
    """Wait for its end; negative: the signal that killed it. Holds no thread meanwhile."""
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    pidfd = os.pidfd_open(child.pid)
    try:
        loop.add_reader(pidfd, ended.set)
        try:
            await ended.wait()
        finally:
            loop.remove_reader(pidfd)
    finally:
        os.close(pidfd)
    return child.wait()
