"""A job brought to any of its states, for tests that kill somebody there.

    python -m tests.trainer.kill_points ROOT STATE

is a host that does so, says "reached", and stays there.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path

from store.job_records import JobState
from tests.trainer.job_stage import TENANT, Stage, stage
from tests.trainer.scripted_worker import Script
from trainer import recovery

STEPS = 12
KILL_POINTS = [state for state in JobState if not state.is_final]
ROOT = Path(__file__).parents[2]
SCRIPT = Script(steps=STEPS, step_s=0.05, save_at=2, save_s=0.3, load_s=0.3)
"""Long enough in each state to be met there."""


async def bring_to(s: Stage, state: JobState, name: str = "one") -> None:
    """A new job, until it is in that state."""
    script = SCRIPT
    if state is JobState.VALIDATING:
        s.preparations.gate.clear()
    if state is JobState.QUEUED:
        await s.create("before", Script(wait_for="go"))
        await s.until("before", JobState.RUNNING)
    if state is JobState.PREPARING:
        script = script.model_copy(update={"load_s": 2.0})
    if state is JobState.RECOVERING:
        recovery.BACKOFF_S = 2.0
        script = script.model_copy(update={"die_at": 4, "well_from": 2})
    if state is JobState.FINALIZING:
        s.publisher.gate.clear()
        script = script.model_copy(update={"linger_s": 5.0})
    await s.create(name, script)
    if state in (JobState.PAUSING, JobState.PAUSED):
        await s.until_step(name, 3)
        await s.jobs.pause(TENANT, name)
    if state is JobState.CANCELLING:
        await s.until_step(name, 3)
        await s.jobs.cancel(TENANT, name, discard=False)
    found = await s.until(name, state)
    assert found.state is state, found


async def let_go_on(s: Stage, name: str = "one") -> None:
    """Nothing holds the job any more."""
    s.preparations.gate.set()
    s.publisher.gate.set()
    (s.root / "go").touch()
    if (await s.job(name)).intent.value == "pause":
        await s.until(name, JobState.PAUSED)
        await s.jobs.resume(TENANT, name)


def start_host(root: Path, state: JobState) -> subprocess.Popen[bytes]:
    """A host in a process of its own, which brings a job to that state."""
    path = os.pathsep.join(path for path in sys.path if path)
    return subprocess.Popen(
        [sys.executable, "-m", "tests.trainer.kill_points", str(root), state.value],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        env={"PYTHONPATH": path, "PATH": os.defpath},
    )


async def main(root: Path, state: JobState) -> None:
    async with stage(root) as s:
        await bring_to(s, state)
        print("reached", flush=True)
        await asyncio.sleep(600)


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), JobState(sys.argv[2])))
