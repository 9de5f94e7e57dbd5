"""The run folder: what a gateway has on disk for as long as it runs, and no longer.

    made -> locked -> sockets, metrics, records of steps -> removed by whoever made it
                      killed before that -> the next gateway of this user removes it

The lock is the kernel's, and ends with the host whatever way that dies. So a folder whose lock is
free is nobody's, of whichever state folder its gateway was.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

PREFIX = "lora-gateway-"
LOCK_FILE = "lock"
MAX_SOCKET_PATH_BYTES = 107
"""Of a Unix socket (unix(7))."""
LONGEST_NAME_BYTES = 36
"""Of a socket in it: vLLM names its own by UUID (vllm/utils/network_utils.py:175)."""
FALLBACK = Path("/tmp")
"""Where it is made if $TMPDIR is too long a path for sockets."""


@contextlib.contextmanager
def run_dir() -> Iterator[Path]:
    """A run folder for this user alone, until the end of the block. Removes those that gateways
    have left. Raises OSError if none can be made."""
    place = Path(tempfile.gettempdir())
    sweep(place)
    path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=place))
    if len(os.fsencode(path)) + 1 + LONGEST_NAME_BYTES > MAX_SOCKET_PATH_BYTES:
        path.rmdir()
        sweep(FALLBACK)
        path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=FALLBACK))
    with contextlib.ExitStack() as held:
        held.callback(shutil.rmtree, path, ignore_errors=True)
        lock = os.open(path / f"{LOCK_FILE}.new", os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        held.callback(os.close, lock)
        fcntl.flock(lock, fcntl.LOCK_EX)
        # Under this name nobody ever finds it free while we live.
        os.rename(path / f"{LOCK_FILE}.new", path / LOCK_FILE)
        yield path


def sweep(place: Path) -> None:
    """Remove the run folders in `place` that gateways of this user have left: those of which
    nobody has the lock. One that cannot be removed is left alone."""
    with contextlib.suppress(OSError):
        for path in place.glob(f"{PREFIX}*"):
            with contextlib.suppress(OSError):
                _remove_if_left(path)


def _remove_if_left(path: Path) -> None:
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
        return
    lock = os.open(path / LOCK_FILE, os.O_RDWR | os.O_NOFOLLOW)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # BlockingIOError: its gateway lives
        shutil.rmtree(path, ignore_errors=True)
    finally:
        os.close(lock)
