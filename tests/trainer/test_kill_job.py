"""SIGKILL of the training process, or of the host, in each state: every job ends once."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest

from store.job_records import HAS_PROCESS, EventKind, JobRecord, JobState
from tests.trainer.job_stage import TENANT, Stage, stage
from tests.trainer.kill_points import KILL_POINTS, STEPS, bring_to, let_go_on, start_host
from trainer.recovery import recovery_of

HAVE_A_PROCESS = [state for state in JobState if state in HAS_PROCESS]
INTERVAL_STEPS = 10
"""From the checkpoint of step 2 to the end: what a kill may cost."""


async def whole(s: Stage, state: JobState) -> JobRecord:
    """The job ended once, told all of it, and left nothing behind."""
    job = await s.ended("one")
    end = JobState.CANCELLED if state is JobState.CANCELLING else JobState.SUCCEEDED
    assert job.state is end, job.error
    events = await s.events("one")
    assert [event.sequence for event in events] == list(range(1, len(events) + 1))
    for seen in range(len(events)):  # however much a watcher had seen when it came back
        watched = [each async for each in s.jobs.watch(TENANT, "one", after=seen, heartbeat_s=60.0)]
        assert watched == events[seen:]
    states = await s.states("one")
    assert [found for found in states if JobState(found).is_final] == [end.value]
    steps = await s.steps("one")
    assert all(step <= before + 1 for before, step in zip([0, *steps], steps, strict=False))
    if end is JobState.SUCCEEDED:
        assert set(steps) == set(range(1, STEPS + 1))
        assert job.manifest is not None
        assert job.manifest["checkpoint"]["attempt"] == job.attempt
        serving = [e.payload for e in events if e.kind is EventKind.PUBLICATION]
        assert [payload["state"] for payload in serving].count("serving") == 1
    assert not s.processes(job) and recovery_of(job).lost_steps <= INTERVAL_STEPS
    return job


@pytest.mark.parametrize("state", HAVE_A_PROCESS, ids=lambda state: state.value)
async def test_kill_job_process(tmp_path: Path, state: JobState) -> None:
    async with stage(tmp_path) as s:
        await bring_to(s, state)
        job = await s.job("one")
        async with asyncio.timeout(60):
            while not (found := s.processes(job)):
                await asyncio.sleep(0.02)
        for pid in found:
            os.kill(pid, signal.SIGKILL)
        await let_go_on(s)
        job = await whole(s, state)
        lost = state in (JobState.PREPARING, JobState.RUNNING)
        assert (recovery_of(job).spent > 0) == lost, "what was to end anyway costs no attempt"


@pytest.mark.slow
@pytest.mark.parametrize("state", KILL_POINTS, ids=lambda state: state.value)
async def test_kill_job_host(tmp_path: Path, state: JobState) -> None:
    host = start_host(tmp_path, state)
    try:
        assert host.stdout is not None
        assert await asyncio.to_thread(host.stdout.readline) == b"reached\n"
        host.kill()
        await asyncio.to_thread(host.wait)
        async with stage(tmp_path) as s:
            await let_go_on(s)
            job = await whole(s, state)
            spent = 1 if state is JobState.RECOVERING else 0
            assert recovery_of(job).spent == spent, "a host that dies costs no attempt"
    finally:
        host.kill()
        host.wait()
        assert host.stdout is not None
        host.stdout.close()
