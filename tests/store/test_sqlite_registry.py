"""The registry in SQLite: the contract of all registries, and what is SQLite's own."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sqlite3
import sys
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import cast

import pytest

from store.records import Arm, RegistryUnusable, VersionState, VersionUnknown
from store.registry import Registry
from store.sqlite_registry import SqliteRegistry
from store.sqlite_schema import connect
from tests.store.failing_connection import FailingConnection
from tests.store.registry_contract import RegistryContract
from tests.store.registry_steps import ACTOR, ONE, MakeRegistry, begin, bring_to, content, ready

ROOT = Path(__file__).parents[2]
BEGIN_AND_DIE = """
import asyncio, os, signal, sys
from pathlib import Path
from store.sqlite_registry import SqliteRegistry
from tests.store.registry_steps import ready

async def main():
    registry = SqliteRegistry(Path(sys.argv[1]))
    await registry.open()
    await ready(registry)
    os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(main())
"""
BEGIN_MANY = """
import asyncio, sys
from pathlib import Path
from store.sqlite_registry import SqliteRegistry
from tests.store.registry_steps import begin

async def main():
    async with SqliteRegistry(Path(sys.argv[1])) as registry:
        print("open", flush=True)
        sys.stdin.readline()
        for _ in range(12):
            await begin(registry)

asyncio.run(main())
"""
CHANGES: dict[str, Callable[[Registry], Awaitable[object]]] = {
    "begin": begin,
    "complete": lambda r: r.complete_version("acme", "sql", 1, content(), actor=ACTOR),
    "fail": lambda r: r.fail_version("acme", "sql", 1, ["bad"], actor=ACTOR),
    "drain": lambda r: r.drain_version("acme", "sql", 2, actor=ACTOR),
    "set_traffic": lambda r: r.set_traffic("acme", "sql", [Arm(2, 1)], actor=ACTOR),
    "mint": lambda r: r.mint_lora_int_id("acme", "sql", 1),
}
READS: dict[str, tuple[str, Callable[[Registry], Awaitable[object]]]] = {
    "adapters": (
        "tenant=? AND adapter>? AND adapter<?",
        lambda r: r.adapters("acme", after="p", prefix="s", limit=100),
    ),
    "versions": (
        "tenant=? AND adapter=? AND version<?",
        lambda r: r.versions("acme", "sql", below=9, limit=100),
    ),
    "versions_in": ("state=?", lambda r: r.versions_in(VersionState.VALIDATING)),
    "find_ready": (
        "digest=? AND tenant=? AND adapter=?",
        lambda r: r.find_ready("acme", "sql", ONE),
    ),
    "version_of_request": (
        "tenant=? AND request_id=?",
        lambda r: r.version_of_request("acme", "r"),
    ),
    "digest_in_use": ("digest=?", lambda r: r.digest_in_use(ONE)),
    "events": ("tenant=? AND sequence>?", lambda r: r.events("acme", after=7, limit=9)),
    "events of one adapter": (
        "tenant=? AND adapter=? AND sequence>?",
        lambda r: r.events("acme", after=7, limit=9, adapter="sql"),
    ),
    "begin": ("tenant=? AND adapter=? AND version=?", begin),
}


async def dump(registry: SqliteRegistry) -> list[str]:
    """All that the file holds."""
    return await registry._read(lambda db: list(db.iterdump()))


@pytest.fixture
def make_registry(tmp_path: Path) -> MakeRegistry:
    return lambda name="registry", **clock: SqliteRegistry(tmp_path / name, **clock)


class TestSqliteRegistry(RegistryContract):
    """The contract, on a file of each test's own."""


async def start(script: str, path: Path) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        script,
        str(path),
        cwd=ROOT,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )


async def test_what_was_changed_survives_a_kill(tmp_path: Path) -> None:
    process = await start(BEGIN_AND_DIE, tmp_path / "db")
    await process.communicate()
    assert process.returncode == -signal.SIGKILL
    async with SqliteRegistry(tmp_path / "db") as registry:
        assert (await registry.version("acme", "sql", 1)).state is VersionState.READY
        assert await registry.last_sequence() == 3
        assert (await begin(registry)).lora_int_id == 2


async def test_two_processes_never_hand_out_one_number_twice(tmp_path: Path) -> None:
    processes = [await start(BEGIN_MANY, tmp_path / "db") for _ in range(2)]
    for process in processes:
        assert process.stdout is not None
        assert await process.stdout.readline() == b"open\n"
    await asyncio.gather(*(process.communicate(b"go\n") for process in processes))
    assert [process.returncode for process in processes] == [0, 0]
    async with SqliteRegistry(tmp_path / "db") as registry:
        records = await registry.versions("acme", "sql", limit=99)
        events = await registry.events("acme", after=0, limit=99)
    assert [record.version for record in records] == list(range(24, 0, -1))
    assert {record.lora_int_id for record in records} == set(range(1, 25))
    assert [event.sequence for event in events] == list(range(1, 25))


def test_who_makes_the_file_waits_for_another_that_does(tmp_path: Path) -> None:
    other = sqlite3.connect(tmp_path / "db", isolation_level=None, check_same_thread=False)
    with contextlib.closing(other):
        other.execute("BEGIN IMMEDIATE")
        end = threading.Timer(0.3, other.execute, ["ROLLBACK"])
        end.start()
        connect(tmp_path / "db", 0).close()
        end.join()


def test_a_commit_is_on_disk_before_it_is_acknowledged(tmp_path: Path) -> None:
    with contextlib.closing(connect(tmp_path / "db", 0)) as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        assert connection.execute("PRAGMA synchronous").fetchone() == (2,)  # FULL


@pytest.mark.parametrize("name", CHANGES)
async def test_a_statement_that_fails_leaves_nothing_of_its_change(
    tmp_path: Path, name: str
) -> None:
    async with SqliteRegistry(tmp_path / "db") as registry:
        await begin(registry)
        await ready(registry, take_traffic=False)
        before, connection = await dump(registry), registry._connection
        assert connection is not None
        failed = 0
        while True:
            failing = FailingConnection(connection, failed + 1)
            registry._connection = cast(sqlite3.Connection, failing)
            try:
                await CHANGES[name](registry)
                break
            except sqlite3.OperationalError:
                failed += 1
            finally:
                registry._connection = connection
            assert await dump(registry) == before
        assert failed > 2  # a read, a write, the commit
        assert await dump(registry) != before


@pytest.mark.parametrize(("bounds", "call"), READS.values(), ids=READS)
async def test_an_index_goes_to_the_rows_wanted_in_their_order(
    tmp_path: Path, bounds: str, call: Callable[[Registry], Awaitable[object]]
) -> None:
    ran: list[str] = []
    async with SqliteRegistry(tmp_path / "db") as registry:
        await ready(registry)
        await registry._read(lambda db: db.set_trace_callback(ran.append))
        await call(registry)
        await registry._read(lambda db: db.set_trace_callback(None))
        steps = await registry._read(
            lambda db: [
                step
                for sql in ran
                if not sql.startswith(("BEGIN", "COMMIT", "ROLLBACK"))
                for *_, step in db.execute(f"EXPLAIN QUERY PLAN {sql}")
            ]
        )
    assert any(f"({bounds})" in step for step in steps), steps
    assert not [step for step in steps if step.startswith(("SCAN", "USE TEMP B-TREE"))], steps


async def test_a_file_that_is_no_database_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "db").write_bytes(b"something else" * 100)
    with pytest.raises(RegistryUnusable, match="restore it from a backup"):
        async with SqliteRegistry(tmp_path / "db"):
            pass
    assert (tmp_path / "db").read_bytes() == b"something else" * 100


async def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RegistryUnusable, match="unable to open database file"):
        async with SqliteRegistry(tmp_path / "none" / "db"):
            pass


async def test_another_programs_database_is_refused(tmp_path: Path) -> None:
    with contextlib.closing(sqlite3.connect(tmp_path / "db")) as connection, connection:
        connection.execute("CREATE TABLE bookmark (url TEXT)")
    with pytest.raises(RegistryUnusable, match="it is another program's database"):
        async with SqliteRegistry(tmp_path / "db"):
            pass


async def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    async with SqliteRegistry(tmp_path / "db") as registry:
        for _ in range(30):
            await begin(registry)
        (page,) = await registry._read(
            lambda db: db.execute(
                "SELECT rootpage FROM sqlite_schema WHERE name = 'adapter_version'"
            ).fetchone()
        )
    with (tmp_path / "db").open("r+b") as file:
        file.seek((page - 1) * 4096 + 8)
        file.write(b"\xff" * 64)
    with pytest.raises(RegistryUnusable, match=r"cannot be used as registry \(.*backup"):
        async with SqliteRegistry(tmp_path / "db"):
            pass


async def test_a_registry_of_a_newer_release_is_refused(tmp_path: Path) -> None:
    async with SqliteRegistry(tmp_path / "db"):
        pass
    with contextlib.closing(sqlite3.connect(tmp_path / "db")) as connection:
        connection.execute("PRAGMA user_version = 6")
    with pytest.raises(RegistryUnusable, match="has schema 6, and this release knows 5"):
        async with SqliteRegistry(tmp_path / "db"):
            pass


async def test_a_shell_that_reads_or_writes_is_not_in_the_way_of_reads(tmp_path: Path) -> None:
    async with SqliteRegistry(tmp_path / "db") as registry:
        record = await bring_to(registry, VersionState.READY)
        with contextlib.closing(sqlite3.connect(tmp_path / "db")) as shell:
            shell.execute("BEGIN IMMEDIATE")
            assert await registry.version("acme", "sql", 1) == record


async def test_a_call_before_open_is_our_bug(tmp_path: Path) -> None:
    registry = SqliteRegistry(tmp_path / "db")
    for call in (registry.last_sequence, lambda: begin(registry)):
        with pytest.raises(RuntimeError, match="not open"):
            await call()
    await registry.close()


async def test_closing_twice_is_fine(tmp_path: Path) -> None:
    registry = SqliteRegistry(tmp_path / "db")
    await registry.open()
    await registry.close()
    await registry.close()


async def test_closing_waits_for_what_runs(tmp_path: Path) -> None:
    registry = SqliteRegistry(tmp_path / "db")
    await registry.open()
    pending = asyncio.create_task(begin(registry))
    await asyncio.sleep(0)
    await registry.close()
    assert (await pending).version == 1


async def test_each_transaction_that_is_durable_is_timed_and_no_other(tmp_path: Path) -> None:
    took_s: list[float] = []
    async with SqliteRegistry(tmp_path / "r.sqlite", observe_commit=took_s.append) as registry:
        await begin(registry)
        await registry.version("acme", "sql", 1)
        assert len(took_s) == 1 and took_s[0] > 0
        with pytest.raises(VersionUnknown):
            await registry.drain_version("acme", "sql", 9, actor=ACTOR)
        assert len(took_s) == 1
