"""Who is to blame for an end, by real processes that end in each way."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from engine.core_death import crashed_by_exception, crashed_by_exit, exit_reason, is_stopped

CRASHES = {
    "raises": "raise RuntimeError",
    "_exit": "os._exit(7)",
    **{
        f"SIG{name}": f"os.kill(os.getpid(), signal.SIG{name})"
        for name in ("SEGV", "ABRT", "BUS", "ILL", "FPE")
    },
}
OTHERS = {
    "ends": "pass",
    **{
        f"SIG{name}": f"os.kill(os.getpid(), signal.SIG{name})"
        for name in ("KILL", "TERM", "HUP", "INT")
    },
}


def code_of(program: str) -> int:
    lines = f"import os, signal\nsignal.signal(signal.SIGINT, signal.SIG_DFL)\n{program}"
    return subprocess.run([sys.executable, "-c", lines], capture_output=True).returncode


@pytest.mark.parametrize("program", CRASHES.values(), ids=CRASHES)
def test_a_process_that_ends_by_what_it_does_crashed(program: str) -> None:
    assert crashed_by_exit(code_of(program))


@pytest.mark.parametrize("program", OTHERS.values(), ids=OTHERS)
def test_one_that_is_ended_or_ends_in_order_did_not(program: str) -> None:
    assert not crashed_by_exit(code_of(program))


@pytest.mark.parametrize(
    ("exits", "crashed"),
    [
        ((), True),
        ((-signal.SIGKILL, -signal.SIGTERM), False),
        ((0, -signal.SIGTERM), False),
        ((-signal.SIGTERM, -signal.SIGSEGV), True),
        ((1,), True),
    ],
)
def test_an_exception_after_a_death_that_computed_for_the_core_is_that_ones_doing(
    exits: tuple[int, ...], crashed: bool
) -> None:
    assert crashed_by_exception(exits) is crashed


def test_how_it_ended_is_told() -> None:
    assert exit_reason(-9) == "killed by SIGKILL" and exit_reason(3) == "exit code 3"
    assert exit_reason(None) == "it failed, and did not exit"


def test_a_process_that_somebody_stopped_is_told_from_one_that_runs_or_sleeps(
    tmp_path: Path,
) -> None:
    child = subprocess.Popen(["sleep", "60"])
    try:
        assert not is_stopped(child.pid) and not is_stopped(os.getpid())
        child.send_signal(signal.SIGSTOP)
        deadline_s = time.monotonic() + 10
        while not is_stopped(child.pid):
            assert time.monotonic() < deadline_s
            time.sleep(0.01)
        child.send_signal(signal.SIGCONT)
        while is_stopped(child.pid):
            assert time.monotonic() < deadline_s
            time.sleep(0.01)
    finally:
        child.kill()
        child.wait()
    assert not is_stopped(child.pid), "it is gone"
    for state, stopped in (("T", True), ("t", True), ("R", False), ("D", False)):
        (tmp_path / "7").mkdir(exist_ok=True)
        (tmp_path / "7" / "stat").write_text(f"7 (a ) T b) {state} 1 7 7\n")
        assert is_stopped(7, tmp_path) is stopped
