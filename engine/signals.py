"""Signals and our child processes: those that they must not see, and the one that they must."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
from collections.abc import Callable, Iterator
from multiprocessing import current_process, resource_tracker

PR_SET_PDEATHSIG = 1
"""prctl(2): the signal that the kernel sends a process when its parent ends."""


@contextlib.contextmanager
def group_signals_blocked() -> Iterator[None]:
    """Processes started inside never see SIGTERM and SIGINT: they inherit this mask.

    Ctrl-C and a supervisor's stop reach the whole process group. The host alone acts on
    them; a core would abort its requests at once (vllm/v1/engine/core.py:1451), while the
    workers mean to drain them. SIGKILL still works, and the host ends its children.
    """
    # Starting the tracker, which the first spawn does, unblocks both signals again.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def tie_children() -> None:
    """From now on no process that `multiprocessing` spawns here outlives this one, nor do those
    that such a process spawns outlive it. Safe to call twice.

    A spawned process imports for seconds before any code of ours runs in it, and a core loads
    its model for minutes after that. So the tie is in what it unpickles first: the
    configuration that each process inherits from the one that makes it.
    """
    current_process()._config[_TIE] = Tie()  # type: ignore[attr-defined]


class Tie:
    """What ties a process to its parent, in the moment in which it is unpickled there."""

    def __reduce__(self) -> tuple[Callable[[int], Tie], tuple[int]]:
        return _tie, (os.getpid(),)  # of the process that spawns, which is not always the host


_TIE = "lora_gateway_tie"


def _tie(parent_pid: int) -> Tie:
    die_with_parent(parent_pid)
    return Tie()  # for the children of this one


def die_with_parent(parent_pid: int) -> None:
    """End this process at once when `parent_pid`, which started it, ends by any means; also if it
    is stopped, or hangs.

    For processes started from a thread that lives as long as the parent: the kernel counts
    the end of that thread as the end of the parent (prctl(2)). The main thread does, and so do
    those of an executor, until it is shut down.
    """
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:  # it ended before the call
        os._exit(1)
