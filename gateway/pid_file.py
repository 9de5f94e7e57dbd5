"""The processes that a gateway has started, for the next one to end if this one cannot.

    a worker or a core starts -> it stands in the file
    the host is killed -> the kernel ends its processes (`engine/signals.py`)
    the next host has the state folder -> what is left of them is killed and waited for -> it starts

Something is left where a process cannot end yet, because it waits for a disk or a driver: it has
its memory, its GPUs and its port until then. Training processes are not in the file: they go
on by design, and are found again by their own means.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
import threading
import time
from pathlib import Path

from pydantic import BaseModel, ValidationError

logger = logging.getLogger(__name__)

FILE = "processes.json"
END_TIMEOUT_S = 30.0
"""How long killed processes may take to be gone before the gateway starts without them."""

PROC = Path("/proc")


class Entry(BaseModel):
    """One process. The pid alone is given out again; with the rest it is one process for ever."""

    pid: int
    start_ticks: int
    """When it began, in ticks of the kernel's clock since the machine's start (proc(5))."""
    what: str
    """What it is, for people."""


class Entries(BaseModel):
    """All that the file holds."""

    boot_id: str
    """Of the machine's run in which they were started."""
    processes: list[Entry] = []


class PidFile:
    """The file of one state folder, whose lock is held. May be used from several threads."""

    def __init__(self, state_dir: Path) -> None:
        self._path = state_dir / FILE
        self._lock = threading.Lock()
        self._boot_id = _boot_id()
        self._entries: list[Entry] = []

    def add(self, pid: int, what: str) -> None:
        """Note a child of ours. A file that cannot be written costs a line in the log."""
        start_ticks = _start_ticks(pid)
        if start_ticks is None:
            return  # it has ended already
        with self._lock:
            lasting = [entry for entry in self._entries if _lives(entry) and entry.pid != pid]
            self._entries = [*lasting, Entry(pid=pid, start_ticks=start_ticks, what=what)]
            try:
                self._write()
            except OSError as error:
                logger.warning("%s cannot be written: %s", self._path, error)

    def _write(self) -> None:
        # Whole or not at all for whoever reads it next. Not synced: after a power cut there is
        # no process either.
        text = Entries(boot_id=self._boot_id, processes=self._entries).model_dump_json()
        partial = self._path.with_suffix(".partial")
        partial.write_text(text)
        os.replace(partial, self._path)

    def sweep(self) -> None:
        """End what a dead gateway has left, and wait until it is gone. Blocks.

        To be called before anything is added.
        """
        left = self._read()
        if left.boot_id != self._boot_id:
            return  # the machine was started again since
        with contextlib.ExitStack() as held:
            killed: dict[int, Entry] = {}
            for entry in left.processes:
                try:
                    if (pidfd := _kill(entry)) is None:
                        continue
                except OSError as error:
                    logger.error("%s cannot be ended: %s", _name(entry), error.strerror)
                    continue
                held.callback(os.close, pidfd)
                killed[pidfd] = entry
                logger.warning("%s was left by a gateway that is gone: killed", _name(entry))
            for entry in _wait(killed):
                logger.error("%s does not end, and may hold what this start needs", _name(entry))

    def _read(self) -> Entries:
        none = Entries(boot_id="")
        try:
            return Entries.model_validate_json(self._path.read_bytes())
        except FileNotFoundError:
            return none
        except (OSError, ValidationError) as error:
            reason = str(error).splitlines()[0]
            logger.warning("%s cannot be read, so nothing is swept: %s", self._path, reason)
            return none


def _name(entry: Entry) -> str:
    return f"process {entry.pid} ({entry.what})"


def _kill(entry: Entry) -> int | None:
    """Kill that process and no other; returns a descriptor that tells its end. None if it is
    gone. Raises OSError if it may not be killed."""
    try:
        pidfd = os.pidfd_open(entry.pid)
    except ProcessLookupError:
        return None
    try:
        # Looked at while it is held: a pid that was given out again in between shows another
        # start, and one that is given out after this look is not what is held.
        if _lives(entry) and not _ended(pidfd):
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            return pidfd
    except ProcessLookupError:
        pass
    except BaseException:
        os.close(pidfd)
        raise
    os.close(pidfd)
    return None


def _wait(killed: dict[int, Entry]) -> list[Entry]:
    """Wait until they are gone; returns those that are not in END_TIMEOUT_S."""
    deadline_s = time.monotonic() + END_TIMEOUT_S
    return [
        entry for pidfd, entry in killed.items() if not _ended(pidfd, deadline_s - time.monotonic())
    ]


def _ended(pidfd: int, timeout_s: float = 0.0) -> bool:
    """Whether a process has ended, or does so in time."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(max(0.0, timeout_s) * 1000))


def _lives(entry: Entry) -> bool:
    return _start_ticks(entry.pid) == entry.start_ticks


def _start_ticks(pid: int) -> int | None:
    """When a process began; None if there is none."""
    try:
        stat = (PROC / str(pid) / "stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return int(stat.rpartition(")")[2].split()[19])  # its name, in brackets, may hold anything


def _boot_id() -> str:
    return (PROC / "sys/kernel/random/boot_id").read_text().strip()
