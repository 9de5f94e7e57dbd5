"""Who ends with whom: real processes, whose parent is killed."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

TARGETS = """
import multiprocessing, os, pathlib, time

def here():
    pathlib.Path(f"at-{os.getpid()}").touch()
    time.sleep(600)

def with_a_child():
    start(here)
    here()

def start(target):
    process = multiprocessing.get_context("spawn").Process(target=target)
    process.start()
"""
SLOW = """
import sys, targets

def importing():
    "Is never reached: its module does not come to its end."

if sys.modules["__main__"].__name__ == "__mp_main__":  # in the child alone
    targets.here()
"""
PARENT = """
import sys

if __name__ == "__main__":
    import slow, targets
    from engine.signals import tie_children

    if "untied" not in sys.argv:
        tie_children()
        tie_children()
    targets.start(getattr(slow if sys.argv[1] == "importing" else targets, sys.argv[1]))
    targets.here()
"""
ROOT = Path(__file__).parents[2]
TIMEOUT_S = 30.0


@contextlib.contextmanager
def family(
    folder: Path, count: int, *arguments: str
) -> Iterator[tuple[subprocess.Popen[bytes], list[psutil.Process]]]:
    """A parent and those below it, once all of them are where they stay."""
    (folder / "targets.py").write_text(TARGETS)
    (folder / "slow.py").write_text(SLOW)
    (folder / "parent.py").write_text(PARENT)
    parent = subprocess.Popen(
        [sys.executable, "parent.py", *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL,
    )
    found: list[psutil.Process] = []
    try:
        deadline_s = time.monotonic() + TIMEOUT_S
        while len(found) < count:
            assert time.monotonic() < deadline_s
            time.sleep(0.02)
            pids = [int(path.name.removeprefix("at-")) for path in folder.glob("at-*")]
            found = [psutil.Process(pid) for pid in pids]
        yield parent, [process for process in found if process.pid != parent.pid]
    finally:
        parent.kill()
        parent.wait()
        for process in found:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


@pytest.mark.parametrize(
    ("target", "count"),
    [("here", 2), ("importing", 2), ("with_a_child", 3)],
    ids=["runs", "still imports", "has a child"],
)
def test_no_spawned_process_outlives_its_parent(target: str, count: int, tmp_path: Path) -> None:
    with family(tmp_path, count, target) as (parent, others):
        for other in others:
            other.send_signal(signal.SIGSTOP)  # it can see nothing any more
        parent.kill()
        _, alive = psutil.wait_procs(others, TIMEOUT_S)
        assert not alive


def test_who_is_not_tied_lives_on(tmp_path: Path) -> None:
    """Else the test above would pass for another reason."""
    with family(tmp_path, 2, "here", "untied") as (parent, [other]):
        parent.kill()
        parent.wait()
        with pytest.raises(psutil.TimeoutExpired):
            other.wait(0.5)
