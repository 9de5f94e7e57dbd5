"""What is made of an attempt whose process has ended."""

from __future__ import annotations

from pathlib import Path

import pytest

from trainer.ending import Failed, Lost, ending
from trainer.events import FailureReason
from trainer.life import EXIT_STORAGE_FULL
from trainer.run_folder import RunExit, RunFolder, write_whole


@pytest.mark.parametrize("said", ["nothing", "that it is through"])
def test_a_process_that_had_no_room_to_say_so_is_known_by_its_exit_code(
    tmp_path: Path, said: str
) -> None:
    run = RunFolder(tmp_path)
    if said != "nothing":  # and no room was left for its manifest
        write_whole(run.exit, RunExit(ok=True))
    how = ending(run, EXIT_STORAGE_FULL)
    assert isinstance(how, Failed)
    assert how.failure.reason is FailureReason.STORAGE_FULL and not how.failure.retryable
    assert isinstance(ending(run, EXIT_STORAGE_FULL + 1), Lost)
