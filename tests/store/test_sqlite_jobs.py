"""The job store in SQLite: the contract of all job stores, and what is SQLite's own."""

from __future__ import annotations

import asyncio
import signal
import sqlite3
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import cast

import pytest

from store import sqlite_schema
from store.job_records import EventKind, Intent, JobChange, JobState, NewEvent
from store.jobs import JobStore
from store.sqlite_jobs import SqliteJobs
from store.sqlite_registry import SqliteRegistry
from store.upload_folder import DatabaseFull
from tests.store.failing_connection import FailingConnection
from tests.store.job_contract import JobContract
from tests.store.job_steps import MakeJobs, add_dataset, bring_to, create, new_job
from tests.store.registry_steps import begin, ready

ROOT = Path(__file__).parents[2]
TELL_AND_DIE = """
import asyncio, os, signal, sys
from pathlib import Path
from store.job_records import EventKind, JobChange, JobState, NewEvent
from store.sqlite_jobs import SqliteJobs
from tests.store.job_steps import bring_to, new_job

async def main():
    store = SqliteJobs(Path(sys.argv[1]))
    await store.open()
    job = await bring_to(store, JobState.RUNNING, new_job("nightly"))
    events = [NewEvent(EventKind.PROGRESS, {"step": step}) for step in range(100)]
    await store.change_job(job, JobChange(events=events, ingested_bytes=900))
    os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(main())
"""


async def _change(store: JobStore, change: JobChange) -> object:
    return await store.change_job(await store.job("acme", "nightly"), change)


CHANGES: dict[str, Callable[[JobStore], Awaitable[object]]] = {
    "add_dataset": lambda s: add_dataset(s, "other"),
    "remove_dataset": lambda s: s.remove_dataset("acme", "spare"),
    "create": lambda s: create(s, request_id="r"),
    "change": lambda s: _change(
        s,
        JobChange(
            state=JobState.FINALIZING,
            attempt=2,
            events=[NewEvent(EventKind.PROGRESS, {"step": step}) for step in range(3)],
        ),
    ),
    "intend": lambda s: s.intend("acme", "nightly", Intent.CANCEL),
    "delete": lambda s: s.delete_job("acme", "ended"),
}
READS: dict[str, tuple[str, Callable[[JobStore], Awaitable[object]]]] = {
    "dataset": ("tenant=? AND name=?", lambda s: s.dataset("acme", "corpus")),
    "datasets": ("tenant=? AND name>?", lambda s: s.datasets("acme", after="a", limit=9)),
    "last name": ("sha256=?", lambda s: s.remove_dataset("acme", "spare")),
    "job": ("tenant=? AND name=?", lambda s: s.job("acme", "nightly")),
    "jobs": ("tenant=? AND number<?", lambda s: s.jobs("acme", limit=9)),
    "jobs of one adapter": (
        "tenant=? AND adapter=? AND number<?",
        lambda s: s.jobs("acme", limit=9, adapter="sql", states=[JobState.RUNNING]),
    ),
    "job_events": (
        "uid=? AND sequence>?",
        lambda s: s.job_events("acme", "nightly", after=3, limit=9),
    ),
    "change": ("uid=?", lambda s: _change(s, JobChange(state=JobState.FINALIZING))),
    "create": ("tenant=? AND request_id=?", lambda s: create(s, request_id="r")),
    "delete": ("uid=?", lambda s: s.delete_job("acme", "ended")),
    "active_jobs": ("", lambda s: s.active_jobs()),
}


async def dump(store: SqliteJobs) -> list[str]:
    """All that the file holds."""
    return await store._read(lambda db: list(db.iterdump()))


async def fill(store: JobStore) -> None:
    """A job that runs, one that has ended, and a dataset that no job needs."""
    await bring_to(store, JobState.RUNNING, new_job("nightly"))
    await bring_to(store, JobState.FAILED, new_job("ended"))
    await add_dataset(store, "spare")


@pytest.fixture
def make_jobs(tmp_path: Path) -> MakeJobs:
    return lambda name="jobs", **clock: SqliteJobs(tmp_path / name, **clock)


class TestSqliteJobs(JobContract):
    """The contract, on a file of each test's own."""


async def test_what_was_told_survives_a_kill(tmp_path: Path) -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", TELL_AND_DIE, str(tmp_path / "db"), cwd=ROOT
    )
    assert await process.wait() == -signal.SIGKILL
    async with SqliteJobs(tmp_path / "db") as store:
        job = await store.job("acme", "nightly")
        assert (job.state, job.last_sequence) == (JobState.RUNNING, 104)
        assert job.ingested_bytes == 900
        events = await store.job_events("acme", "nightly", after=0, limit=999)
        assert [event.sequence for event in events] == list(range(1, 105))


@pytest.mark.parametrize("name", CHANGES)
async def test_a_statement_that_fails_leaves_nothing_of_its_change(
    tmp_path: Path, name: str
) -> None:
    async with SqliteJobs(tmp_path / "db") as store:
        await fill(store)
        before, connection = await dump(store), store._connection
        assert connection is not None
        failed = 0
        while True:
            failing = FailingConnection(connection, failed + 1)
            store._connection = cast(sqlite3.Connection, failing)
            try:
                # What is read to prepare a change is not of its transaction.
                await CHANGES[name](store)
                break
            except sqlite3.OperationalError:
                failed += 1
            finally:
                store._connection = connection
            assert await dump(store) == before
        assert failed > 2  # a read, a write, the commit
        assert await dump(store) != before


@pytest.mark.parametrize(("bounds", "call"), READS.values(), ids=READS)
async def test_an_index_goes_to_the_rows_wanted_in_their_order(
    tmp_path: Path, bounds: str, call: Callable[[JobStore], Awaitable[object]]
) -> None:
    ran: list[str] = []
    async with SqliteJobs(tmp_path / "db") as store:
        await fill(store)
        await store._read(lambda db: db.set_trace_callback(ran.append))
        await call(store)
        await store._read(lambda db: db.set_trace_callback(None))
        steps = await store._read(
            lambda db: [
                step
                for sql in ran
                if not sql.startswith(("BEGIN", "COMMIT", "ROLLBACK", "--"))
                for *_, step in db.execute(f"EXPLAIN QUERY PLAN {sql}")
            ]
        )
    if bounds:
        assert any(f"({bounds})" in step for step in steps), steps
    # Those that have not ended are few, and have an index of their own.
    few = ("SCAN job USING INDEX job_active", "SCAN job USING COVERING INDEX job_active")
    slow = [step for step in steps if step.startswith(("SCAN", "USE TEMP B-TREE"))]
    assert [step for step in slow if step not in (*few, "SCAN CONSTANT ROW")] == []


async def test_a_name_that_is_taken_is_made_anew(tmp_path: Path) -> None:
    uids = iter(
        [f"{number:06x}" + "0" * 25 + str(turn) for turn, number in enumerate([1, 1, 1, 2])]
    )
    async with SqliteJobs(tmp_path / "db", make_uid=lambda: next(uids)) as store:
        await add_dataset(store)
        first, second = await create(store), await create(store)
    assert (first.name, second.name) == ("sql-000001", "sql-000002")
    assert second.uid == "000002" + "0" * 25 + "3"


async def test_a_uid_that_is_given_is_kept_whatever_the_name_is(tmp_path: Path) -> None:
    uids = iter(["a" * 32, "b" * 32])
    async with SqliteJobs(tmp_path / "db", make_uid=lambda: next(uids)) as store:
        await add_dataset(store)
        first = await create(store, uid="f" * 32)
        second = await create(store, uid="f" * 6 + "0" * 26)
    assert (first.name, first.uid) == ("sql-ffffff", "f" * 32)
    assert (second.name, second.uid) == ("sql-aaaaaa", "f" * 6 + "0" * 26)


async def test_registry_and_jobs_wait_for_each_other(tmp_path: Path) -> None:
    """Each writes as fast as it can for a while; both get on, and nobody finds the file locked."""
    path, seconds = tmp_path / "db", 2.0
    async with SqliteRegistry(path) as registry, SqliteJobs(path) as store:
        await ready(registry)
        job = await bring_to(store, JobState.RUNNING)
        end_s = time.monotonic() + seconds
        waits_s: list[float] = []

        async def score(number: int) -> int:
            count = 0
            while time.monotonic() < end_s:
                await registry.record_feedback("acme", "sql", 1, f"r{number}-{count}", 1.0)
                count += 1
            return count

        async def tell() -> int:
            while (begun_s := time.monotonic()) < end_s:
                event = NewEvent(EventKind.PROGRESS, {"step": len(waits_s)})
                await store.change_job(job, JobChange(events=[event] * 10))
                waits_s.append(time.monotonic() - begun_s)
            return len(waits_s)

        scored, told = await asyncio.gather(
            asyncio.gather(*(score(number) for number in range(4))), tell()
        )
        summary = (await registry.feedback("acme", "sql"))[1]
        assert summary.count == sum(scored) > 20
        assert (await store.job("acme", job.name)).last_sequence == job.last_sequence + 10 * told
        assert told > 20
        assert max(waits_s) < seconds / 2


async def test_one_waits_for_the_other_as_long_as_it_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only for those outside of this process there is a limit."""
    monkeypatch.setattr(sqlite_schema, "BUSY_TIMEOUT_S", 0.01)
    path = tmp_path / "db"
    async with SqliteRegistry(path) as registry, SqliteJobs(path) as store:
        slow = asyncio.create_task(registry._write(lambda db: time.sleep(0.5)))
        await asyncio.sleep(0.1)
        await add_dataset(store)
        await slow


async def test_both_can_make_the_file_at_once(tmp_path: Path) -> None:
    for attempt in range(5):
        registry = SqliteRegistry(tmp_path / f"db-{attempt}")
        store = SqliteJobs(tmp_path / f"db-{attempt}")
        await asyncio.gather(registry.open(), store.open())
        await asyncio.gather(begin(registry), add_dataset(store))
        await asyncio.gather(registry.close(), store.close())


async def test_a_call_before_open_is_our_bug(tmp_path: Path) -> None:
    store = SqliteJobs(tmp_path / "db")
    with pytest.raises(RuntimeError, match="not open"):
        await store.active_jobs()
    await store.close()


async def test_a_full_disk_is_said_to_be_full(tmp_path: Path) -> None:
    async with SqliteJobs(tmp_path / "db") as store:
        job = await bring_to(store, JobState.RUNNING, new_job("nightly"))
        (pages,) = await store._read(lambda db: db.execute("PRAGMA page_count").fetchone())
        # What SQLite says of a disk without space is what it says of a file that may not grow.
        await store._read(lambda db: db.execute(f"PRAGMA max_page_count = {pages}").fetchone())
        much = [NewEvent(EventKind.PROGRESS, {"text": "x" * 4096})] * 100
        with pytest.raises(DatabaseFull, match="disk is full"):
            await store.change_job(job, JobChange(events=much))
        assert await store.job("acme", "nightly") == job
        await store._read(lambda db: db.execute("PRAGMA max_page_count = 1000000").fetchone())
        assert (await store.change_job(job, JobChange(events=much))).last_sequence > 100
