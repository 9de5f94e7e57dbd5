"""Jobs of several tenants and priorities take turns, also across restarts of the gateway."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from pathlib import Path

from store.job_records import JobRecord, JobState
from tests.trainer.job_stage import SOON_S, Stage, stage
from tests.trainer.scripted_worker import Script


async def create(s: Stage, tenant: str, name: str, *, priority: int = 0) -> JobRecord:
    """A job that waits, if it has to."""
    data = await s.store.dataset("acme", "data")
    await s.store.add_dataset(tenant, "data", sha256=data.sha256, size_bytes=1, format="")
    await s.jobs.create(tenant, s.spec(publish=False), name=name, priority=priority)
    return await reached(s, tenant, name, JobState.QUEUED)


async def reached(s: Stage, tenant: str, name: str, state: JobState) -> JobRecord:
    """The job once it was in that state, or is beyond it."""
    async with asyncio.timeout(SOON_S):
        while True:
            job = await s.store.job(tenant, name)
            told = await s.store.job_events(tenant, name, after=0, limit=99)
            if state.value in [event.payload.get("state") for event in told]:
                return job
            await asyncio.sleep(0.01)


async def places(s: Stage, *names: tuple[str, str]) -> list[int]:
    """In the queue, once all of them have one: a start takes a moment."""
    async with asyncio.timeout(SOON_S):
        while True:
            jobs = [await s.store.job(*name) for name in names]
            told = [s.jobs.queue_position(job) for job in jobs]
            if all(told):
                return told
            await asyncio.sleep(0.01)


def script(s: Stage, name: str, script: Script) -> None:
    (s.root / "scripts").mkdir(exist_ok=True)
    (s.root / "scripts" / f"{name}.json").write_text(script.model_dump_json())


async def test_what_tenants_had_is_known_to_the_next_gateway(tmp_path: Path) -> None:
    waiting = [("acme", "a"), ("other", "b"), ("acme", "urgent")]
    async with stage(tmp_path) as s:
        await create(s, "acme", "first")
        first = await reached(s, "acme", "first", JobState.SUCCEEDED)
        await s.jobs.delete("acme", "first")
        await s.restart()
        script(s, "blocker", Script(wait_for="go"))
        await create(s, "third", "blocker")
        await reached(s, "third", "blocker", JobState.RUNNING)
        await create(s, "acme", "a")
        await create(s, "other", "b")
        await create(s, "acme", "urgent", priority=1)
        assert await places(s, *waiting) == [3, 2, 1], "acme had the device before"
        told = [("acme", 0, 4), ("fourth", 0, 3), ("fourth", 1, 1), ("acme", -1, 4)]
        for tenant, priority, place in told:
            assert s.jobs.position_of_new(tenant, priority) == place
        assert s.jobs.position_of_new("third", 0) == 3
        await s.stop()
        with contextlib.closing(sqlite3.connect(tmp_path / "registry.sqlite")) as db, db:
            db.execute("UPDATE device_use SET used_s = 1800 WHERE tenant = 'acme'")
            an_hour_ns = 3600 * 10**9
            db.execute("UPDATE job SET device_time_ns = device_time_ns - ?", (an_hour_ns,))
        await s.restart()
        assert await places(s, *waiting) == [3, 2, 1]
        assert s.jobs.position_of_new("third", 0) == 4, "it has the device for an hour"
        (tmp_path / "go").touch()
        ended = [await reached(s, *name, JobState.SUCCEEDED) for name in waiting]
        (use,) = [use for use in await s.store.device_uses() if use.tenant == "third"]
        blocker = await s.store.job("third", "blocker")
    starts = [job.start_time_ns or 0 for job in ended]
    assert sorted(starts) == [starts[2], starts[1], starts[0]]
    assert first.start_time_ns and blocker.start_time_ns == use.grant_time_ns
    assert use.used_s > 3000
