"""The run folder: gone with its gateway, or else with the next one's start."""

from __future__ import annotations

import errno
import os
import signal
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import uuid4

import pytest

from gateway import run_dir as module
from gateway import serve
from gateway.run_dir import LOCK_FILE, PREFIX, run_dir

HOLDS = """
import sys, tempfile, time
from gateway import run_dir as module
from gateway import serve
tempfile.tempdir, module.MAX_SOCKET_PATH_BYTES = sys.argv[1], 4096
with module.run_dir() as folder:
    (folder / "counter_1.db").write_text("1")
    print(folder, flush=True)
    time.sleep(600)
"""
Start = Callable[[], tuple[subprocess.Popen[str], Path]]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary files go."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(module, "MAX_SOCKET_PATH_BYTES", 4096)  # wherever that is
    return tmp_path


@pytest.fixture
def start(place: Path) -> Iterator[Start]:
    """Starts a process with a run folder in that place."""
    started: list[subprocess.Popen[str]] = []

    def start() -> tuple[subprocess.Popen[str], Path]:
        process = subprocess.Popen(
            [sys.executable, "-c", HOLDS, str(place)], stdout=subprocess.PIPE, text=True
        )
        started.append(process)
        assert process.stdout is not None
        return process, Path(process.stdout.readline().strip())

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_it_is_its_users_alone_and_goes_with_the_block(place: Path) -> None:
    with run_dir() as folder:
        assert folder.parent == place
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        (folder / "control.sock").touch()
        (folder / "pymp-x").mkdir()
    assert not folder.exists()


def test_what_a_killed_gateway_has_left_goes_with_the_next_start(start: Start) -> None:
    (killed, left), (_, alive) = start(), start()
    killed.kill()
    assert killed.wait() == -signal.SIGKILL
    assert (left / "counter_1.db").exists()
    with run_dir() as folder:
        assert not left.exists()
        assert (alive / "counter_1.db").exists()
        with run_dir():
            assert folder.exists(), "our own, and those of this process, are held too"


def test_a_stopped_gateway_keeps_its_own(start: Start) -> None:
    stopped, folder = start()
    stopped.send_signal(signal.SIGSTOP)
    with run_dir():
        assert (folder / LOCK_FILE).exists()


def test_what_is_no_run_folder_is_left_alone(place: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / LOCK_FILE).touch()
    (place / f"{PREFIX}link").symlink_to(elsewhere)
    (place / f"{PREFIX}file").touch()
    unlocked = place / f"{PREFIX}unlocked"  # of one that is being made
    unlocked.mkdir()
    with run_dir():
        pass
    assert {path.name for path in place.glob(f"{PREFIX}*")} == {
        *(f"{PREFIX}link", f"{PREFIX}file", f"{PREFIX}unlocked")
    }
    assert (elsewhere / LOCK_FILE).exists()


def test_another_users_is_left_alone(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = place / f"{PREFIX}theirs"
    theirs.mkdir()
    (theirs / LOCK_FILE).touch()
    mine = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: mine + 1)
    with run_dir():
        assert theirs.exists()
    monkeypatch.undo()
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    with run_dir():
        assert not theirs.exists()


def test_sockets_fit_into_it_however_long_the_path_of_temporary_files_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = tmp_path.joinpath(*["x" * 40] * 3)
    long.mkdir(parents=True)
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    with run_dir() as folder, socket.socket(socket.AF_UNIX) as listener:
        assert folder.parent == module.FALLBACK
        listener.bind(str(folder / str(uuid4())))
    assert not [*long.iterdir()]
    assert not folder.exists()


def test_a_gateway_that_gets_none_says_so_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(**options: object) -> str:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/tmp/lora-gateway-x")

    monkeypatch.setattr(tempfile, "mkdtemp", refuse)
    assert serve.main(["--state-dir", str(tmp_path / "state")]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("gateway serve: ") and "No space left" in line
