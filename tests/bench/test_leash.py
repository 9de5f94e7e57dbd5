import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

LIMIT_S = 60.0
COMMAND = "trap 'exit 0' TERM; sleep 1000 & echo $$ $!; wait"
"""It ends when it is asked to, and leaves a child behind, as vLLM leaves its engine core."""


@pytest.fixture
def leash() -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-m", "tests.bench.leash", "sh", "-c", COMMAND],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def close_the_pipe(leash: subprocess.Popen[str], command: psutil.Process) -> None:
    assert leash.stdin is not None
    leash.stdin.close()


def kill_the_command(leash: subprocess.Popen[str], command: psutil.Process) -> None:
    command.send_signal(signal.SIGKILL)


@pytest.mark.parametrize("end", [close_the_pipe, kill_the_command])
def test_nothing_of_a_command_outlives_its_owner_or_itself(
    leash: subprocess.Popen[str],
    end: Callable[[subprocess.Popen[str], psutil.Process], None],
) -> None:
    assert leash.stdout is not None
    command, child = (psutil.Process(int(pid)) for pid in leash.stdout.readline().split())
    end(leash, command)
    leash.wait(LIMIT_S)
    _, alive = psutil.wait_procs([command, child], timeout=LIMIT_S)
    assert not alive
