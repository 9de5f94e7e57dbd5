"""A training process: started in a session of its own, found again, and ended with all it left.

It outlives us. What proves that it lives is the lock that it was handed; what proves that a
process belongs to it is MARKER in the environment that it began with. Both hold for one that an
earlier gateway started, and neither is fooled by a process id that was given out again.
"""

from __future__ import annotations

import errno
import fcntl
import os
import select
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from trainer.run_folder import RunFolder

MARKER = "LORA_GATEWAY_RUN"
"""Variable with the run's folder; every process of a run inherits it."""

PROC = Path("/proc")
STARTING_S = 2.0
"""How long a process that was forked may take to become the training process."""
KILL_S = 3.0
"""How long a killed process may take to be gone; one that waits for a disk takes longer."""
POLL_S = 0.02

_TELLS_NOTHING = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO})
"""Errors of looking at a process that are ours or the system's. All others say that it has ended,
or is somebody else's."""


class TrainingProcess:
    """The process of one attempt. All methods block, if not for long."""

    def __init__(self, run: RunFolder, pidfd: int, child: subprocess.Popen[bytes] | None) -> None:
        """`child` if it is one of ours, whose exit code we learn."""
        self._run = run
        self._pidfd = pidfd
        self._child = child
        self._reaper: threading.Thread | None = None
        if child is not None:
            # It may outlive us, so no executor's thread may wait for it: that would be joined.
            self._reaper = threading.Thread(
                target=child.wait, name=f"reaper-{child.pid}", daemon=True
            )
            try:
                self._reaper.start()
            except BaseException:
                os.close(pidfd)
                raise

    @classmethod
    def start(
        cls, run: RunFolder, command: Sequence[str], environment: Mapping[str, str]
    ) -> TrainingProcess:
        """Start it in its folder. Raises OSError if it does not start."""
        lock = os.open(run.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with run.log.open("ab") as log:
                child = subprocess.Popen(
                    command,
                    cwd=run.path,
                    env={**environment, MARKER: str(run.path)},
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    pass_fds=(lock,),
                    start_new_session=True,
                )
        finally:
            os.close(lock)  # the child has the lock now, if there is one
        try:
            return cls(run, os.pidfd_open(child.pid), child)
        except BaseException:  # out of files or threads: nobody would know that it runs
            os.killpg(child.pid, signal.SIGKILL)  # it leads its session, and is not reaped yet
            child.wait()
            raise

    @classmethod
    def find(cls, run: RunFolder) -> TrainingProcess | None:
        """The process of a run that somebody before us started; None: it has ended.

        Raises OSError if that cannot be told, as when too many files are open.
        """
        deadline_s = time.monotonic() + STARTING_S
        while is_locked(run):
            for pid in members(run):
                if _leads(run, pid) and (pidfd := _open(run, pid, _is_member)) is not None:
                    return cls(run, pidfd, None)
            if time.monotonic() >= deadline_s:
                return None  # only what it left over has the lock
            time.sleep(POLL_S)
        return None

    @property
    def running(self) -> bool:
        """Whether the process itself, not what it started, has not ended."""
        poll = select.poll()  # select takes no file with a number above 1023
        poll.register(self._pidfd, select.POLLIN)
        return not poll.poll(0)

    @property
    def exit_code(self) -> int | None:
        """Once it has ended; negative: the signal that killed it. None: nobody told us."""
        if self._child is None or self.running:
            return None
        assert self._reaper is not None
        self._reaper.join(KILL_S)
        return self._child.returncode

    def terminate(self) -> None:
        """Ask it to end (SIGTERM), and nothing that it started."""
        _send(self._pidfd, signal.SIGTERM)

    def close(self) -> None:
        """Look at it no more; it goes on."""
        os.close(self._pidfd)


def is_locked(run: RunFolder) -> bool:
    """Whether a process of this run lives."""
    try:
        lock = os.open(run.lock, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(lock)
    return False


def members(run: RunFolder) -> list[int]:
    """The ids of all processes of this run, its own and what they started. Raises OSError if
    they cannot be looked at."""
    return [pid for pid in _pids() if _is_member(run, pid)]


def kill_all(run: RunFolder) -> bool:
    """End every process of a run at once; whether none is left. Raises OSError if that cannot
    be told."""
    deadline_s = time.monotonic() + KILL_S
    while True:
        left = members(run)
        for pid in left:
            _kill(run, pid, _is_member)
        if not left:
            if not is_locked(run):
                return True
            for pid in _pids():  # one that cleared its environment keeps the lock
                _kill(run, pid, _has_lock)
        if time.monotonic() >= deadline_s:
            return False
        time.sleep(POLL_S)


def _pids() -> list[int]:
    return [int(entry.name) for entry in PROC.iterdir() if entry.name.isdecimal()]


def _kill(run: RunFolder, pid: int, is_its: Callable[[RunFolder, int], bool]) -> None:
    if is_its(run, pid) and (pidfd := _open(run, pid, is_its)) is not None:
        _send(pidfd, signal.SIGKILL)
        os.close(pidfd)


def _is_member(run: RunFolder, pid: int) -> bool:
    try:
        environment = (PROC / str(pid) / "environ").read_bytes()
    except OSError as error:
        return _is_none(error)
    return f"{MARKER}={run.path}".encode() in environment.split(b"\0")


def _open(run: RunFolder, pid: int, is_its: Callable[[RunFolder, int], bool]) -> int | None:
    """A handle of the process, which stays its own when its id is given out again."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return None
    if is_its(run, pid):
        return pidfd
    os.close(pidfd)
    return None


def _has_lock(run: RunFolder, pid: int) -> bool:
    """Whether it was handed the run's lock, and not just has the file open, as one that looks
    whether it is free."""
    if pid == os.getpid():
        return False
    process = PROC / str(pid)
    try:
        lock = run.lock.stat()
        return any(
            os.path.samestat(lock, fd.stat())
            and b"FLOCK  ADVISORY  WRITE" in (process / "fdinfo" / fd.name).read_bytes()
            for fd in (process / "fd").iterdir()
        )
    except OSError as error:  # or it closes a file as we look
        return _is_none(error)


def _leads(run: RunFolder, pid: int) -> bool:
    """Whether it is the process that we start: it leads its session, and was handed the lock."""
    try:
        if os.getsid(pid) != pid:
            return False
        lock = run.lock.stat()
        return any(os.path.samestat(lock, fd.stat()) for fd in (PROC / str(pid) / "fd").iterdir())
    except OSError as error:  # or it closes a file as we look
        return _is_none(error)


def _is_none(error: OSError) -> bool:
    """False, where a process could not be looked at because it is none of the run. A run that is
    taken for ended would be killed, so what says nothing about the process is raised."""
    if error.errno in _TELLS_NOTHING:
        raise error
    return False


def _send(pidfd: int, number: signal.Signals) -> None:
    try:
        signal.pidfd_send_signal(pidfd, number)
    except ProcessLookupError:
        return  # it has ended
