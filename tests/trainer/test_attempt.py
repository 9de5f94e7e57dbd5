"""An attempt whose start is cut off."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any, cast

import pytest

from trainer.attempt import Attempt
from trainer.journal import Journal
from trainer.run_folder import RunFolder, RunPlan


class SlowlyStarted(Attempt):
    """Its process is there once it is let go on."""

    go_on = threading.Event()

    def _start(self, *_: Any) -> None:
        self.go_on.wait(60)
        self._run.path.mkdir(parents=True)
        self._run.lock.touch()


async def test_whether_a_process_was_started_is_not_told_while_one_is(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "1")
    attempt = SlowlyStarted(run, Journal(cast(Any, None), tmp_path))
    starting = asyncio.create_task(attempt.start(cast(RunPlan, None), [], {}))
    await asyncio.sleep(0)
    starting.cancel()  # a wish came, and the job's next step looks whether there is a process
    with pytest.raises(asyncio.CancelledError):
        await starting
    asked = asyncio.create_task(attempt.was_started())
    await asyncio.sleep(0.05)
    assert not asked.done()
    SlowlyStarted.go_on.set()
    assert await asked, "else another would be started beside it"
