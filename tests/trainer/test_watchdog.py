"""A process that hangs is told from one that takes its time."""

from __future__ import annotations

from pathlib import Path

import pytest

from trainer.run_folder import RunFolder
from trainer.watchdog import LOADING_S, Signs, Watchdog, signs

TIMEOUT_S = 60.0


class Process:
    """What a process shows, and a watchdog that looks at it twice a second."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.watchdog = Watchdog(TIMEOUT_S, lambda: self.now_s)
        self.alive_ns, self.progress_ns, self.events_bytes = 1, 0, 0

    def goes_on(self, duration_s: float, *, alive: bool = True) -> str | None:
        """For so long, without getting on: how it hangs by then, if it does."""
        how = None
        for _ in range(round(duration_s * 2)):
            self.now_s += 0.5
            self.alive_ns += alive
            how = how or self.look()
        return how

    def look(self) -> str | None:
        return self.watchdog.look(Signs(self.alive_ns, self.progress_ns, self.events_bytes))


@pytest.fixture
def process() -> Process:
    return Process()


def test_one_that_gets_on_does_not_hang_however_long_it_trains(process: Process) -> None:
    for _ in range(200):
        process.progress_ns += 1
        assert process.goes_on(10.0) is None


def test_one_that_does_not_get_on_hangs_though_its_thread_lives(process: Process) -> None:
    process.progress_ns = 1
    assert process.goes_on(TIMEOUT_S - 1) is None
    assert process.goes_on(2.0) == "did not get on for 60 s"


def test_an_event_is_a_sign_too(process: Process) -> None:
    process.progress_ns = 1
    for _ in range(5):
        process.events_bytes += 100
        assert process.goes_on(TIMEOUT_S - 1) is None


def test_long_steps_are_known_by_the_longest(process: Process) -> None:
    process.progress_ns = 1
    assert process.goes_on(40.0) is None
    process.progress_ns = 2
    assert process.goes_on(190.0) is None
    assert process.goes_on(15.0) == "did not get on for 200 s"


def test_loading_is_not_hanging_as_long_as_it_shows_that_it_lives(process: Process) -> None:
    assert process.goes_on(10 * TIMEOUT_S) is None
    assert process.goes_on(LOADING_S) == "had not loaded after 3600 s"


def test_one_that_is_stopped_while_it_loads_hangs(process: Process) -> None:
    assert process.goes_on(10.0) is None
    how = process.goes_on(TIMEOUT_S + 1, alive=False)
    assert how == "showed no sign of life for 60 s while it loaded"


def test_time_in_which_we_did_not_look_does_not_count(process: Process) -> None:
    process.progress_ns = 1
    assert process.goes_on(10.0) is None
    process.now_s += 3600.0
    assert process.look() is None


def test_signs_are_those_of_the_run_folder(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    assert signs(run) == Signs(0, 0, 0)
    for path in (run.alive, run.progress, run.events):
        path.write_text("ab")
    found = signs(run)
    assert found.alive_ns and found.progress_ns and found.events_bytes == 2
