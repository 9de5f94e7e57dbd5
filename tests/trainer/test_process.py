"""Training processes: found by proof, ended with all that they started."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.trainer.job_stage import gone
from trainer import process as process_module
from trainer.process import TrainingProcess, is_locked, kill_all, members
from trainer.run_folder import RunFolder

SLEEP = "import time; time.sleep(600)"
WITH_CHILDREN = f"""
import subprocess, sys, os
env = dict(os.environ)
subprocess.Popen([sys.executable, "-c", {SLEEP!r}], start_new_session=True)
if os.fork() == 0:
    {SLEEP}
print("ready", flush=True)
"""


@pytest.fixture
def run(tmp_path: Path) -> Iterator[RunFolder]:
    folder = RunFolder(tmp_path / "1")
    folder.path.mkdir()
    yield folder
    kill_all(folder)


def start(run: RunFolder, code: str) -> TrainingProcess:
    return TrainingProcess.start(run, [sys.executable, "-c", code], {"PATH": os.defpath})


def wait_for_text(run: RunFolder, text: str) -> None:
    deadline_s = time.monotonic() + 10
    while text not in run.log.read_text():
        assert time.monotonic() < deadline_s
        time.sleep(0.02)


def wait_until_ended(process: TrainingProcess) -> None:
    deadline_s = time.monotonic() + 10
    while process.running:
        assert time.monotonic() < deadline_s
        time.sleep(0.02)


def test_a_process_has_its_own_session_its_folder_and_no_terminal(run: RunFolder) -> None:
    process = start(
        run,
        "import os, sys; print(os.getcwd(), os.getsid(0) == os.getpid(), repr(sys.stdin.read()),"
        " flush=True);"
        " print('wrong', file=sys.stderr)",
    )
    wait_until_ended(process)
    assert process.exit_code == 0
    assert run.log.read_text() == f"{run.path} True ''\nwrong\n"
    assert not is_locked(run)
    process.close()


def test_the_exit_code_tells_the_signal(run: RunFolder) -> None:
    process = start(run, SLEEP)
    assert process.running and is_locked(run)
    process.terminate()
    wait_until_ended(process)
    assert process.exit_code == -15
    process.close()


def test_a_process_is_found_again_by_its_lock_and_its_marker(run: RunFolder) -> None:
    process = start(run, SLEEP)
    found = TrainingProcess.find(run)
    assert found is not None and found.running and found.exit_code is None
    found.terminate()
    wait_until_ended(found)
    assert TrainingProcess.find(run) is None
    found.close()
    process.close()


def test_nothing_is_found_where_nothing_was_started(run: RunFolder) -> None:
    assert TrainingProcess.find(run) is None
    assert not is_locked(run) and members(run) == []


def test_all_that_a_process_started_ends_with_it_and_nothing_else(run: RunFolder) -> None:
    other = RunFolder(run.path.with_name("10"))  # begins with the same letters
    other.path.mkdir()
    bystander = start(other, SLEEP)
    alike = subprocess.Popen([sys.executable, "-c", SLEEP], cwd=run.path)
    try:
        process = start(run, WITH_CHILDREN)
        wait_for_text(run, "ready")
        wait_until_ended(process)
        left = members(run)
        assert len(left) == 2, "a fork, and one in a session of its own"
        assert kill_all(run)
        assert gone(left)
        assert bystander.running and alike.poll() is None
        process.close()
    finally:
        alike.kill()
        alike.wait()
        assert kill_all(other)
        bystander.close()


def test_what_a_dead_process_left_over_is_not_taken_for_it(run: RunFolder) -> None:
    process = start(run, WITH_CHILDREN)
    wait_for_text(run, "ready")
    wait_until_ended(process)
    assert is_locked(run), "the fork has the lock too"
    assert TrainingProcess.find(run) is None
    assert kill_all(run) and not is_locked(run)
    process.close()


def test_a_program_that_is_not_there_does_not_start(run: RunFolder) -> None:
    with pytest.raises(FileNotFoundError):
        TrainingProcess.start(run, ["/nowhere/python"], {})
    assert not is_locked(run)


def test_a_process_that_cannot_be_looked_at_does_not_go_on(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def out_of_files(_pid: int) -> int:
        raise OSError(errno.EMFILE, "too many open files")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="too many"):
        patch.setattr(os, "pidfd_open", out_of_files)
        start(run, SLEEP)
    assert members(run) == [] and not is_locked(run)


def test_a_process_is_looked_at_however_many_files_are_open(run: RunFolder) -> None:
    process = start(run, SLEEP)
    high = TrainingProcess(run, fcntl.fcntl(process._pidfd, fcntl.F_DUPFD_CLOEXEC, 1100), None)
    assert high.running
    process.terminate()
    wait_until_ended(process)
    assert not high.running
    high.close()
    process.close()


def test_a_process_hears_that_it_is_to_end_however_many_files_are_open(run: RunFolder) -> None:
    code = f"""
import os, time
from pathlib import Path
from trainer.fence import Fence
from trainer.life import Life
from trainer.run_folder import RunFolder, StopRequest, write_whole
for _ in range(1100):
    os.open("/dev/null", os.O_RDONLY)
run = RunFolder(Path({str(run.path)!r}))
with Life(run, Fence(run, 1), lambda: None) as life:
    life.loaded()
    write_whole(run.stop, StopRequest(save=False))
    end_s = time.monotonic() + 10
    while not life.stop_requested and time.monotonic() < end_s:
        time.sleep(0.02)
print(life.stop_requested)
"""
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.stdout == "True\n", done.stderr


def test_who_has_the_lock_ends_also_without_the_marker(run: RunFolder) -> None:
    process = start(
        run,
        "import subprocess, sys\n"
        f"subprocess.Popen([sys.executable, '-c', {SLEEP!r}], env={{}}, close_fds=False)\n",
    )
    reader = run.lock.open("rb")  # looks at the file, as we do to see whether it is locked
    bystander = subprocess.Popen(["sleep", "600"], pass_fds=(reader.fileno(),))
    try:
        wait_until_ended(process)
        assert members(run) == [] and is_locked(run)
        assert kill_all(run) and not is_locked(run)
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()
        reader.close()
        process.close()


def test_two_processes_cannot_have_one_folder(run: RunFolder) -> None:
    process = start(run, SLEEP)
    with pytest.raises(BlockingIOError):
        start(run, SLEEP)
    process.close()


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.EIO])
@pytest.mark.parametrize("where", ["_is_member", "_leads"])
def test_a_process_that_cannot_be_looked_at_is_not_taken_for_ended(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch, where: str, number: int
) -> None:
    process = start(run, SLEEP)

    class Broken(type(run.path)):  # type: ignore[misc]
        def __truediv__(self, name: str) -> Path:
            wanted = {"_is_member": "environ", "_leads": "fd"}[where]
            if name == wanted:
                raise OSError(number, os.strerror(number))
            return Broken(super().__truediv__(name))

    with monkeypatch.context() as patch:
        patch.setattr(process_module, "PROC", Broken("/proc"))
        with pytest.raises(OSError) as caught:
            TrainingProcess.find(run)
        assert caught.value.errno == number
        if where == "_is_member":
            with pytest.raises(OSError, match=os.strerror(number)):
                kill_all(run)
    assert process.running
    found = TrainingProcess.find(run)
    assert found is not None
    found.close()
    process.close()
