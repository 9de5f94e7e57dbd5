"""One process at a time owns the state folder."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from store.state_folder import StateFolder, StateFolderLocked, StateFolderUnusable

HOLD = """
import sys, time
from pathlib import Path
from store.state_folder import StateFolder

folder = StateFolder(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""
ROOT = Path(__file__).parents[2]


def test_the_folder_is_made_for_its_owner_alone(tmp_path: Path) -> None:
    with StateFolder(tmp_path / "deep" / "state") as folder:
        assert stat.S_IMODE(folder.path.stat().st_mode) == 0o700


def test_the_path_is_absolute_even_if_a_relative_one_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with StateFolder(Path("state")) as folder:
        assert folder.path == tmp_path.resolve() / "state"


def test_a_second_holder_is_told_who_holds_it_and_what_to_do(tmp_path: Path) -> None:
    with StateFolder(tmp_path), pytest.raises(StateFolderLocked) as caught:
        StateFolder(tmp_path)
    assert caught.value.holder_pid == os.getpid()
    assert str(caught.value) == (
        f"state folder {tmp_path} is in use by process {os.getpid()}; stop it, or choose another "
        "--state-dir"
    )


def test_a_holder_that_has_not_written_its_pid_is_another_process(tmp_path: Path) -> None:
    with StateFolder(tmp_path):
        (tmp_path / "lock").write_text("")
        with pytest.raises(StateFolderLocked, match="in use by another process") as caught:
            StateFolder(tmp_path)
    assert caught.value.holder_pid is None


def test_a_refused_holder_does_not_disturb_the_first(tmp_path: Path) -> None:
    with StateFolder(tmp_path):
        for _ in range(2):
            with pytest.raises(StateFolderLocked):
                StateFolder(tmp_path)
        assert (tmp_path / "lock").read_text() == f"{os.getpid()}\n"


def test_closing_lets_the_next_one_in(tmp_path: Path) -> None:
    first = StateFolder(tmp_path)
    first.close()
    first.close()
    StateFolder(tmp_path).close()


def test_a_pid_of_more_digits_is_overwritten_whole(tmp_path: Path) -> None:
    (tmp_path / "lock").write_text("12345678901234567890\n")
    with StateFolder(tmp_path):
        assert (tmp_path / "lock").read_text() == f"{os.getpid()}\n"


def test_a_killed_holder_leaves_the_folder_free(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    with holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(StateFolderLocked, match=f"process {holder.pid};"):
            StateFolder(tmp_path)
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    StateFolder(tmp_path).close()


def test_a_file_is_no_state_folder(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("")
    with pytest.raises(StateFolderUnusable, match="is a file, or lies under one"):
        StateFolder(tmp_path / "state")
    with pytest.raises(StateFolderUnusable, match="is a file, or lies under one"):
        StateFolder(tmp_path / "state" / "below")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_of_somebody_else_is_refused_with_the_reason(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(StateFolderUnusable, match=r"cannot be written \(Permission denied\)"):
        StateFolder(tmp_path)


def test_a_lock_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    state = tmp_path / "state"
    state.mkdir()
    (state / "lock").symlink_to(victim)
    with pytest.raises(StateFolderUnusable, match="cannot be written"):
        StateFolder(state)
    assert victim.read_text() == "precious"
