"""Signals that our child processes must not see."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator


@contextlib.contextmanager
def group_signals_blocked() -> Iterator[None]:
    """Processes started inside never see SIGTERM and SIGINT: they inherit this mask.

    Ctrl-C and a supervisor's stop reach the whole process group. The host alone acts on
    them; a core would abort its requests at once (vllm/v1/engine/core.py:1451), while the
    workers mean to drain them. SIGKILL still works, and the host ends its children.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
