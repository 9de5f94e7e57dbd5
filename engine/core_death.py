"""How a core died, and whether what it computed is to blame."""

from __future__ import annotations

import signal
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from engine.step_record import Steps

CRASH_SIGNALS = frozenset(
    {
        *(signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGILL, signal.SIGFPE),
        *(signal.SIGTRAP, signal.SIGSYS),
    }
)
"""What a process gets for what it does itself. SIGKILL is somebody else's doing, the kernel's among
them when memory is short."""


@dataclass(frozen=True, slots=True)
class CoreDeath:
    """The end of one core."""

    reason: str
    """For people."""
    crashed: bool = False
    """Whether it ended by itself, while it computed or not."""
    steps: Steps = field(default_factory=Steps)
    """What it was computing then; nothing unless it crashed."""


def crashed_by_exit(code: int) -> bool:
    """Whether an exit code, as `multiprocessing` has it, tells of a crash.

    So it does for an error of Python's (vLLM logs it and exits with 1), for `os._exit`, and for
    the signals above. Whoever sends another signal ends a process that did nothing.
    """
    return code > 0 or (code < 0 and -code in CRASH_SIGNALS)


def crashed_by_exception(executor_exits: Iterable[int]) -> bool:
    """Whether a core that ended with an exception did so by what it computed.

    Not where a process that computed for it was killed. vLLM ends the others then, so their
    codes say nothing, unless one crashed.
    """
    exits = list(executor_exits)
    return not exits or any(map(crashed_by_exit, exits))


def exit_reason(code: int | None) -> str:
    """For people."""
    if code is None:
        return "it failed, and did not exit"
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def is_stopped(pid: int, proc: Path = Path("/proc")) -> bool:
    """Whether somebody has stopped that process (SIGSTOP, a debugger), so that it cannot go on."""
    try:
        stat = (proc / str(pid) / "stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] in ("T", "t")
