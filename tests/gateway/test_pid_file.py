"""What a gateway that was killed has left: ended by the next one, and nobody else is."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from gateway import pid_file as module
from gateway.pid_file import FILE, PidFile

Start = Callable[[], subprocess.Popen[bytes]]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts a process that lives until the end of the test."""
    started: list[subprocess.Popen[bytes]] = []

    def start() -> subprocess.Popen[bytes]:
        started.append(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


def change(folder: Path, **fields: Any) -> None:
    """Write another value into what the file says of its only process, or of the whole."""
    content = json.loads((folder / FILE).read_text())
    [entry] = content["processes"]
    for name, value in fields.items():
        (entry if name in entry else content)[name] = value
    (folder / FILE).write_text(json.dumps(content))


@pytest.mark.parametrize("stopped", [False, True])
def test_what_is_left_is_ended_before_the_sweep_returns(
    stopped: bool, start: Start, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    core, worker, stranger = start(), start(), start()
    before = PidFile(tmp_path)
    before.add(core.pid, "core of shard-0")
    before.add(worker.pid, "worker")
    if stopped:
        core.send_signal(signal.SIGSTOP)
    PidFile(tmp_path).sweep()
    for process in (core, worker):
        assert psutil.Process(process.pid).status() == psutil.STATUS_ZOMBIE, (
            "ended, and not collected"
        )
        assert process.wait() == -signal.SIGKILL
    assert stranger.poll() is None
    assert [record.getMessage() for record in caplog.records] == [
        f"process {core.pid} (core of shard-0) was left by a gateway that is gone: killed",
        f"process {worker.pid} (worker) was left by a gateway that is gone: killed",
    ]


def test_a_pid_that_was_given_out_again_is_somebody_else(
    start: Start, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stranger = start()
    PidFile(tmp_path).add(stranger.pid, "worker")
    ticks = json.loads((tmp_path / FILE).read_text())["processes"][0]["start_ticks"]
    change(tmp_path, start_ticks=ticks - 1)
    PidFile(tmp_path).sweep()
    assert stranger.poll() is None and not caplog.records
    change(tmp_path, start_ticks=ticks)
    PidFile(tmp_path).sweep()
    assert stranger.wait() == -signal.SIGKILL, "it was the number alone"


def test_a_file_from_before_the_machine_was_started_again_names_nobody(
    start: Start, tmp_path: Path
) -> None:
    stranger = start()
    PidFile(tmp_path).add(stranger.pid, "worker")
    change(tmp_path, boot_id="another")
    PidFile(tmp_path).sweep()
    assert stranger.poll() is None


@pytest.mark.parametrize("content", [b"", b'{"boot_id": "x", "proc', b"[]", b"\xff"])
def test_a_torn_file_is_told_and_costs_nothing(
    content: bytes, start: Start, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / FILE).write_bytes(content)
    PidFile(tmp_path).sweep()
    [record] = caplog.records
    assert "cannot be read, so nothing is swept" in record.getMessage()
    process = start()
    PidFile(tmp_path).add(process.pid, "worker")
    PidFile(tmp_path).sweep()
    assert process.wait() == -signal.SIGKILL


def test_the_first_start_has_nothing_to_sweep(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    PidFile(tmp_path).sweep()
    assert not caplog.records


def test_one_that_may_not_be_killed_does_not_save_the_others(
    start: Start,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    foreign, ours = start(), start()
    before = PidFile(tmp_path)
    before.add(foreign.pid, "worker")
    before.add(ours.pid, "worker")
    send = signal.pidfd_send_signal
    refusals = iter([PermissionError(1, "Operation not permitted")])

    def refuse_once(pidfd: int, number: int) -> None:
        for refusal in refusals:
            raise refusal
        send(pidfd, number)

    monkeypatch.setattr(signal, "pidfd_send_signal", refuse_once)
    descriptors = psutil.Process().num_fds()
    PidFile(tmp_path).sweep()
    assert foreign.poll() is None and ours.wait() == -signal.SIGKILL
    assert f"process {foreign.pid} (worker) cannot be ended: Operation not permitted" in caplog.text
    assert psutil.Process().num_fds() == descriptors


def test_one_that_does_not_end_is_told_and_not_waited_for_for_ever(
    start: Start,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """As one that waits for a driver: the signal has come, and nothing happens."""
    stuck = start()
    PidFile(tmp_path).add(stuck.pid, "core of shard-0")
    monkeypatch.setattr(signal, "pidfd_send_signal", lambda pidfd, number: None)
    monkeypatch.setattr(module, "END_TIMEOUT_S", 0.1)
    PidFile(tmp_path).sweep()
    assert f"process {stuck.pid} (core of shard-0) does not end" in caplog.text
    assert stuck.poll() is None


def test_one_that_has_ended_by_itself_is_not_told(
    start: Start, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    uncollected, gone = start(), start()
    before = PidFile(tmp_path)
    for process in (uncollected, gone):
        before.add(process.pid, "worker")
        process.kill()
    gone.wait()
    while psutil.Process(uncollected.pid).status() != psutil.STATUS_ZOMBIE:
        pass
    PidFile(tmp_path).sweep()
    assert not caplog.records


def test_the_file_keeps_those_that_live(start: Start, tmp_path: Path) -> None:
    first, second, third = start(), start(), start()
    file = PidFile(tmp_path)
    for process in (first, second, second):
        file.add(process.pid, "worker")
    first.kill()
    first.wait()
    file.add(third.pid, "core of shard-0")
    file.add(first.pid, "one that has ended already")
    content = json.loads((tmp_path / FILE).read_text())
    assert [entry["pid"] for entry in content["processes"]] == [second.pid, third.pid]
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


def test_a_disk_that_is_full_costs_a_line_in_the_log(
    start: Start,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", fail)
    with caplog.at_level(logging.WARNING):
        PidFile(tmp_path).add(start().pid, "worker")
    assert "No space left on device" in caplog.text


def test_a_name_in_brackets_does_not_hide_when_a_process_began(tmp_path: Path) -> None:
    script = tmp_path / "a) 1 2 (b"
    script.write_text("#!/bin/sh\nread line\n")
    script.chmod(0o700)
    with subprocess.Popen([str(script)], stdin=subprocess.PIPE) as process:
        PidFile(tmp_path).add(process.pid, "worker")
        [entry] = json.loads((tmp_path / FILE).read_text())["processes"]
        began_s = entry["start_ticks"] / os.sysconf("SC_CLK_TCK") + psutil.boot_time()
        assert abs(began_s - psutil.Process(process.pid).create_time()) < 1.5
