"""Runs a command as long as its owner lives: whatever ends the owner ends all of the command.

    python -m tests.bench.leash COMMAND...

The owner holds the other end of stdin, and closes it to end the command, which is asked first. An
engine core of vLLM goes on when its parent is killed (vllm#55510), so the whole group is ended.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
import sys

GRACE_S = 20.0
"""How long the command gets to end by itself."""


def main() -> int:
    """Entry of the process. Returns the command's exit code."""
    # A terminal's interrupt is for the owner, who closes the pipe in turn.
    os.setpgid(0, 0)
    with subprocess.Popen(
        sys.argv[1:], stdin=subprocess.DEVNULL, start_new_session=True
    ) as command:
        try:
            _wait_either(command)
            command.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                command.wait(GRACE_S)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(command.pid, signal.SIGKILL)
    return command.returncode


def _wait_either(command: subprocess.Popen[bytes]) -> None:
    """Until stdin is closed or the command has ended."""
    ended = os.pidfd_open(command.pid)
    try:
        with selectors.DefaultSelector() as selector:
            selector.register(sys.stdin, selectors.EVENT_READ)
            selector.register(ended, selectors.EVENT_READ)
            selector.select()
    finally:
        os.close(ended)


if __name__ == "__main__":
    sys.exit(main())
