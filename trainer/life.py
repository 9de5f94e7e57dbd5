"""Signs of life of a training process, and how it hears that it is to end.

A thread does both, so that they work also while the main thread is deep in a library: it
touches the run's `alive` file, looks for `stop.json`, and hears of SIGTERM.

    loading      ends the process at once: nothing is lost
    training     sets `stop_requested`, which is looked at after each micro-batch
    again        a second SIGTERM ends the process in whatever it does
    fenced       a newer attempt of the job was begun: ends at once, and writes nothing
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType, TracebackType
from typing import Self

from pydantic import ValidationError

from trainer.fence import Fence
from trainer.run_folder import RunFolder, StopRequest

ALIVE_PERIOD_S = 2.0
PROGRESS_PERIOD_S = 0.5
POLL_PERIOD_S = 0.2
EXIT_KILLED = 128 + signal.SIGTERM
EXIT_FENCED = 4
"""A newer attempt of the job was begun, so nobody asks what became of this one."""
EXIT_STORAGE_FULL = 5
"""The disk had no room for what the run saves, and maybe not for its exit.json either."""


class Life:
    """Of the process's main thread, which enters and leaves it."""

    def __init__(
        self, run: RunFolder, fence: Fence, ended_while_loading: Callable[[], None]
    ) -> None:
        """`ended_while_loading` is called by the thread, and ends the process."""
        self._run = run
        self._fence = fence
        self._ended_while_loading = ended_while_loading
        self._signals, self._wake_up = socket.socketpair()
        self._got_on_s = float("-inf")
        self._loading = True
        self._phase = threading.Lock()
        """Held while a phase ends: training does not begin in a process that is ending."""
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="life", daemon=True)
        self.stop_requested = False
        self.save_requested = True
        """Whether a stop is to leave a checkpoint."""

    def __enter__(self) -> Self:
        self._wake_up.setblocking(False)
        # A Python handler runs between bytecodes, so not while a library loads for a minute. The
        # byte is written by C code in whatever thread the signal meets.
        signal.set_wakeup_fd(self._wake_up.fileno())
        signal.signal(signal.SIGTERM, _heard_by_the_thread)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._closing.set()
        self._thread.join()
        signal.set_wakeup_fd(-1)
        # Its end is written down. A signal that comes now would make another exit status of it.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        self._signals.close()
        self._wake_up.close()

    def gets_on(self) -> None:
        """Show that the main thread does. Called by it, after each micro-batch."""
        now_s = time.monotonic()
        if now_s - self._got_on_s >= PROGRESS_PERIOD_S:
            self._got_on_s = now_s
            _touch(self._run.progress)

    def loaded(self) -> None:
        """From now on a stop waits for the micro-batch that runs."""
        with self._phase:
            self._loading = False

    def _watch(self) -> None:
        touched_s = float("-inf")
        signals = 0
        poll = select.poll()  # select takes no file with a number above 1023
        poll.register(self._signals, select.POLLIN)
        while not self._closing.is_set():
            if time.monotonic() - touched_s >= ALIVE_PERIOD_S:
                _touch(self._run.alive)
                touched_s = time.monotonic()
                if not self._fence.holds:
                    os._exit(EXIT_FENCED)
            if poll.poll(POLL_PERIOD_S * 1000):
                signals += self._signals.recv(64).count(signal.SIGTERM)
            if signals > 1:
                os._exit(EXIT_KILLED)
            if not self.stop_requested and (signals or self._run.stop.exists()):
                self._stop()

    def _stop(self) -> None:
        try:
            request = StopRequest.model_validate_json(self._run.stop.read_bytes())
            self.save_requested = request.save
        except (OSError, ValidationError):  # a signal alone: keep what there is
            self.save_requested = True
        with self._phase:
            if self._loading:
                self._ended_while_loading()
            self.stop_requested = True


def _touch(path: Path) -> None:
    # A full disk is no reason to look dead; that it is full shows where something is saved.
    with contextlib.suppress(OSError):
        path.touch()


def _heard_by_the_thread(_number: int, _frame: FrameType | None) -> None:
    """Only so that Python writes the signal to the wake-up socket."""
