"""Watching jobs: everything, in order, once, for as many as want to."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from store.job_records import JobEventRecord, JobRecord, JobState, JobUnknown
from tests.trainer.job_stage import TENANT, Stage, stage
from tests.trainer.scripted_worker import Script
from trainer.job_folder import JobFolder
from trainer.job_log import Logs
from trainer.journal import Heartbeat

WATCHERS = 200


async def watch(s: Stage, name: str, *, after: int = 0, pause_s: float = 0.0) -> list[int]:
    """Sequence numbers that a watcher was told."""
    told = []
    async for item in s.jobs.watch(TENANT, name, after=after, heartbeat_s=60.0):
        if isinstance(item, JobEventRecord):
            told.append(item.sequence)
            await asyncio.sleep(pause_s)
    return told


async def test_two_hundred_watchers_miss_nothing_whenever_they_come(tmp_path: Path) -> None:
    async with stage(tmp_path) as s:
        await s.create("one", Script(steps=60, step_s=0.02))
        watchers = []
        for number in range(WATCHERS):
            after = number % 7
            watchers.append((after, asyncio.create_task(watch(s, "one", after=after))))
            await asyncio.sleep(0.005)
        slow = asyncio.create_task(watch(s, "one", pause_s=0.01))
        job = await s.ended("one")
        async with asyncio.timeout(20):
            for after, watcher in watchers:
                assert await watcher == list(range(after + 1, job.last_sequence + 1))
            assert await slow == list(range(1, job.last_sequence + 1))


async def test_a_watch_of_a_job_that_has_ended_replays_it_and_ends(tmp_path: Path) -> None:
    async with stage(tmp_path) as s:
        await s.create("one")
        job = await s.ended("one")
        assert await watch(s, "one") == list(range(1, job.last_sequence + 1))
        assert await watch(s, "one", after=job.last_sequence) == []


async def test_where_nothing_happens_a_heartbeat_says_who_lives(tmp_path: Path) -> None:
    async with stage(tmp_path) as s:
        await s.create("one", Script(wait_for="go"))
        await s.until_step("one", 3)
        beats = []
        async for item in s.jobs.watch(TENANT, "one", after=0, heartbeat_s=0.2):
            if isinstance(item, Heartbeat):
                beats.append(item)
                if len(beats) == 2:
                    break
        (tmp_path / "go").touch()
        job = await s.ended("one")
    assert {beat.state for beat in beats} == {JobState.RUNNING}
    assert beats[-1].sequence > 3
    seen_ns = beats[-1].trainer_time_ns
    assert seen_ns is not None and (job.start_time_ns or 0) < seen_ns < time.time_ns()


async def test_a_job_without_a_process_has_no_sign_of_one(tmp_path: Path) -> None:
    async with stage(tmp_path) as s:
        s.preparations.gate.clear()
        await s.create("one")
        watcher = s.jobs.watch(TENANT, "one", after=1, heartbeat_s=0.1)
        beat = await anext(watcher)
        await watcher.aclose()
        assert beat == Heartbeat(1, JobState.VALIDATING, None)


async def test_what_is_not_there_cannot_be_watched_or_read(tmp_path: Path) -> None:
    async with stage(tmp_path) as s:
        with pytest.raises(JobUnknown):
            await watch(s, "nobody")
        with pytest.raises(JobUnknown):
            await anext(s.jobs.logs(TENANT, "nobody", offset=0, follow=False))


async def log(s: Stage, offset: int = 0, *, follow: bool = False) -> bytes:
    """The log as it comes, checked to come in order."""
    read = b""
    async for piece in s.jobs.logs(TENANT, "one", offset=offset, follow=follow):
        assert piece.offset == offset + len(read)
        read += piece.data
    return read


async def test_a_log_is_read_from_an_offset_and_followed_to_the_end(tmp_path: Path) -> None:
    text = "words " * 30_000
    async with stage(tmp_path) as s:
        await s.create("one", Script(say=text, wait_for="go"))
        follower = asyncio.create_task(log(s, follow=True))
        await s.until_step("one", 1)
        assert await log(s) == f"{text}\n".encode()
        assert not follower.done()
        (tmp_path / "go").touch()
        assert await asyncio.wait_for(follower, 20) == f"{text}\n".encode()
        assert await log(s, 100_000) == f"{text}\n".encode()[100_000:]
        assert await log(s, 10**9) == b""


async def test_a_log_runs_over_all_attempts(tmp_path: Path) -> None:
    async with stage(tmp_path) as s:
        await s.create("one", Script(say="first"))
        job = await s.ended("one")
        second = s.run_folder(job, 2)
        second.path.mkdir()
        second.log.write_bytes(b"second\n")
        twice = replace(job, attempt=2)

        async def look() -> JobRecord:
            return twice

        async def read(offset: int) -> list[tuple[int, bytes]]:
            folder = JobFolder(tmp_path / "jobs" / job.uid)
            pieces = Logs().pieces(look, folder, offset=offset, follow=True)
            return [(piece.offset, piece.data) async for piece in pieces]

        assert await read(0) == [(0, b"first\n"), (6, b"second\n")]
        assert await read(9) == [(9, b"ond\n")]


async def test_a_change_is_read_once_for_all_who_watch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with stage(tmp_path) as s:
        s.preparations.gate.clear()
        job = await s.create("one")
        watchers = [
            s.jobs.watch(TENANT, "one", after=job.last_sequence, heartbeat_s=60.0)
            for _ in range(WATCHERS)
        ]
        waiting = [asyncio.ensure_future(anext(watcher)) for watcher in watchers]
        await asyncio.sleep(0.2)
        reads = 0
        job_events = s.store.job_events

        async def counted(*names: str, **bounds: Any) -> list[JobEventRecord]:
            nonlocal reads
            reads += 1
            return await job_events(*names, **bounds)

        monkeypatch.setattr(s.store, "job_events", counted)
        s.preparations.gate.set()
        told = await asyncio.wait_for(asyncio.gather(*waiting), 20)
        assert [item.sequence for item in told] == [job.last_sequence + 1] * WATCHERS
        assert reads < 5
        for watcher in watchers:
            await watcher.aclose()


async def test_a_log_is_looked_at_once_for_all_who_follow_it(tmp_path: Path) -> None:
    async with stage(tmp_path) as s:
        await s.create("one", Script(say="words", wait_for="go"))
        job = await s.until_step("one", 1)
        looks = 0

        async def look() -> JobRecord:
            nonlocal looks
            looks += 1
            return await s.job("one")

        async def followed(offset: int) -> bytes:
            pieces = logs.pieces(look, folder, offset=offset, follow=True)
            return b"".join([piece.data async for piece in pieces])

        logs, folder = Logs(), JobFolder(tmp_path / "jobs" / job.uid)
        followers = [asyncio.create_task(followed(number % 5)) for number in range(WATCHERS)]
        await asyncio.sleep(2.0)
        assert looks < WATCHERS + 20, "each when it comes, and then four times a second in all"
        (tmp_path / "go").touch()
        for number, follower in enumerate(followers):
            assert await asyncio.wait_for(follower, 20) == b"words\n"[number % 5 :]
        assert not logs._tails, "nobody looks any more"


async def test_those_who_follow_a_log_hear_that_the_job_was_deleted(tmp_path: Path) -> None:
    async with stage(tmp_path) as s:
        await s.create("one", Script(say="words", wait_for="go"))
        await s.until_step("one", 1)
        gone = False

        async def look() -> JobRecord:
            if gone:
                raise JobUnknown("one")
            return await s.job("one")

        folder = JobFolder(tmp_path / "jobs" / (await s.job("one")).uid)
        logs = Logs()
        followers = [logs.pieces(look, folder, offset=0, follow=True) for _ in range(3)]
        for follower in followers:
            assert (await anext(follower)).data == b"words\n"
        gone = True
        for follower in followers:
            with pytest.raises(JobUnknown):
                await asyncio.wait_for(anext(follower), 5)
        gone = False
        again = logs.pieces(look, folder, offset=0, follow=True)
        assert (await anext(again)).data == b"words\n"
        await again.aclose()
        (tmp_path / "go").touch()
