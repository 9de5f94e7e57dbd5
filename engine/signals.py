"""Signals and our child processes: which they must not see, and the one they must."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
from collections.abc import Iterator
from multiprocessing import resource_tracker

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


def die_with_parent(parent_pid: int) -> None:
    """End this process at once when `parent_pid`, which started it, ends by any means.

    For processes started from a thread that lives as long as the parent: the kernel counts
    the end of that thread as the end of the parent (prctl(2)).
    """
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:  # it ended before the call
        os._exit(1)
