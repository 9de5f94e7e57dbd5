"""A file of an older schema becomes one of today's that lacks nothing, or stays as it was."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest

from store import sqlite_migration, sqlite_schema
from store.device_use import DeviceUse
from store.job_records import Intent, JobChange, JobState
from store.records import (
    AdapterRecord,
    Arm,
    Content,
    EventKind,
    RegistryUnusable,
    VersionRecord,
    VersionState,
)
from store.sqlite_job_schema import JOB_SCHEMA, QUEUE_SCHEMA, RECOVERY_SCHEMA
from store.sqlite_jobs import SqliteJobs
from store.sqlite_registry import SqliteRegistry
from tests.store.job_steps import add_dataset, create, new_job
from tests.store.registry_steps import ONE, TWO, begin
from tests.store.schema_2 import leave_schema_2
from tests.store.schema_3 import leave_schema_3
from tests.store.schema_4 import leave_schema_4

NOW_NS = 5_000
# As the release that knew schema 1 wrote it.
SCHEMA_1 = """
CREATE TABLE lora_int_id (
    last INTEGER NOT NULL              -- one row
) STRICT;

CREATE TABLE adapter (
    tenant       TEXT NOT NULL,
    adapter      TEXT NOT NULL,
    last_version INTEGER NOT NULL,
    PRIMARY KEY (tenant, adapter)
) STRICT, WITHOUT ROWID;

CREATE TABLE adapter_version (
    tenant         TEXT NOT NULL,
    adapter        TEXT NOT NULL,
    version        INTEGER NOT NULL,
    digest         TEXT NOT NULL,
    lora_int_id    INTEGER NOT NULL UNIQUE,
    create_time_ns INTEGER NOT NULL,   -- since the epoch
    PRIMARY KEY (tenant, adapter, version),
    UNIQUE (tenant, adapter, digest),
    FOREIGN KEY (tenant, adapter) REFERENCES adapter
) STRICT, WITHOUT ROWID;
PRAGMA user_version = 1;
"""
ROWS_1 = f"""
INSERT INTO lora_int_id VALUES (7);
INSERT INTO adapter VALUES ('acme', 'sql', 3), ('acme', 'chat', 1), ('other', 'sql', 2);
INSERT INTO adapter_version VALUES
    ('acme', 'sql', 1, '{ONE}', 1, 1000),
    ('acme', 'sql', 3, '{TWO}', 7, 3000),
    ('other', 'sql', 2, '{ONE}', 4, 2000);
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    with contextlib.closing(sqlite3.connect(tmp_path / "db")) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.executescript(SCHEMA_1 + ROWS_1)
    return tmp_path / "db"


def dump(path: Path) -> list[str]:
    with contextlib.closing(sqlite3.connect(path)) as connection:
        version = str(connection.execute("PRAGMA user_version").fetchone())
        return [version, *connection.iterdump()]


@pytest.fixture
def path_2(tmp_path: Path) -> Path:
    leave_schema_2(tmp_path / "db-2")
    return tmp_path / "db-2"


@pytest.fixture
def path_3(tmp_path: Path) -> Path:
    leave_schema_3(tmp_path / "db-3")
    return tmp_path / "db-3"


@pytest.fixture
def path_4(tmp_path: Path) -> Path:
    leave_schema_4(tmp_path / "db-4")
    return tmp_path / "db-4"


def clock_ns() -> int:
    return NOW_NS


async def test_versions_stay_ready_under_their_numbers_and_ids(path: Path) -> None:
    async with SqliteRegistry(path, clock_ns=clock_ns) as registry:
        records = await registry.versions_in(VersionState.READY)
    assert [(r.tenant, r.adapter, r.version, r.lora_int_id) for r in records] == [
        ("acme", "sql", 1, 1),
        ("acme", "sql", 3, 7),
        ("other", "sql", 2, 4),
    ]
    assert records[1] == VersionRecord(
        tenant="acme",
        adapter="sql",
        version=3,
        state=VersionState.READY,
        lora_int_id=7,
        source_uri="",
        expected_sha256="",
        fingerprints={},
        labels={},
        take_traffic=True,
        create_time_ns=3000,
        update_time_ns=NOW_NS,
        content=Content(TWO, weights_sha256="", size_bytes=0, rank=0, target_modules=()),
    )


async def test_the_newest_version_of_each_adapter_has_the_traffic(path: Path) -> None:
    async with SqliteRegistry(path, clock_ns=clock_ns) as registry:
        snapshot = await registry.snapshot()
    assert snapshot == [
        (AdapterRecord("acme", "chat", (), None, 0, 1, NOW_NS, NOW_NS), ()),
        (AdapterRecord("acme", "sql", (Arm(3, 100),), None, 1, 3, 1000, NOW_NS), (1, 3)),
        (AdapterRecord("other", "sql", (Arm(2, 100),), None, 1, 2, 2000, NOW_NS), (2,)),
    ]


async def test_the_trail_begins_with_what_was_there(path: Path) -> None:
    async with SqliteRegistry(path, clock_ns=clock_ns) as registry:
        acme = await registry.events("acme", after=0, limit=99)
        other = await registry.events("other", after=0, limit=99)
        assert await registry.last_sequence() == 8
    told = [(e.sequence, e.time_ns, e.kind, e.version, e.arms) for e in acme]
    assert told == [
        (1, 1000, EventKind.VERSION_CREATED, 1, ()),
        (3, 3000, EventKind.VERSION_CREATED, 3, ()),
        (4, NOW_NS, EventKind.VERSION_READY, 1, ()),
        (5, NOW_NS, EventKind.VERSION_READY, 3, ()),
        (7, NOW_NS, EventKind.TRAFFIC_SET, 0, (Arm(3, 100),)),
    ]
    assert [e.sequence for e in other] == [2, 6, 8]
    assert {(e.actor, e.reason) for e in acme + other} == {("gateway", "taken over from schema 1")}


async def test_counters_go_on(path: Path) -> None:
    async with SqliteRegistry(path) as registry:
        record = await begin(registry)
        assert (record.version, record.lora_int_id) == (4, 8)
        assert (await begin(registry, "chat")).version == 2
        assert await registry.last_sequence() == 10


@pytest.mark.parametrize("schema", [1, 2, 3, 4])
async def test_it_happens_once_and_leaves_the_tables_of_a_new_file(
    path: Path, path_2: Path, path_3: Path, path_4: Path, tmp_path: Path, schema: int
) -> None:
    path = {1: path, 2: path_2, 3: path_3, 4: path_4}[schema]
    async with SqliteRegistry(path):
        pass
    migrated = dump(path)
    async with SqliteRegistry(path), SqliteRegistry(tmp_path / "new"):
        pass
    assert dump(path) == migrated

    def tables(lines: list[str]) -> list[str]:
        return sorted(line for line in lines if line.startswith(("(", "CREATE")))

    assert tables(migrated) == tables(dump(tmp_path / "new"))


@pytest.mark.parametrize("failing", ["INSERT INTO event ", "UPDATE counter", "DROP TABLE"])
async def test_a_migration_that_fails_leaves_schema_1(
    path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    before = dump(path)
    migrate: Callable[..., contextlib.AbstractContextManager[None]] = (
        sqlite_migration.migrate_1_to_2
    )

    class FailingConnection:
        def __init__(self, connection: sqlite3.Connection) -> None:
            self._connection = connection

        def execute(self, sql: str, *arguments: object) -> sqlite3.Cursor:
            if failing in sql:
                raise sqlite3.OperationalError("database or disk is full")
            return self._connection.execute(sql, *arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patch, pytest.raises(RegistryUnusable):
        patch.setattr(
            sqlite_schema,
            "migrate_1_to_2",
            lambda connection, now_ns: migrate(FailingConnection(connection), now_ns),
        )
        async with SqliteRegistry(path):
            pass
    assert dump(path) == before
    async with SqliteRegistry(path) as registry:
        assert await registry.last_sequence() == 8


async def test_what_schema_2_kept_is_left_alone(path_2: Path) -> None:
    before = dump(path_2)
    async with SqliteJobs(path_2), SqliteRegistry(path_2) as registry:
        assert (await registry.version("acme", "sql", 1)).state is VersionState.READY
        assert (await registry.adapter("acme", "sql")).arms == (Arm(1, 100),)
    after = dump(path_2)
    assert set(before[1:]) < set(after)
    assert (before[0], after[0]) == ("(2,)", "(5,)")
    assert not [line for line in set(after) - set(before) if line.startswith("INSERT")]


@pytest.mark.parametrize("schema", [1, 2])
async def test_jobs_begin_in_a_file_of_an_older_schema(
    path: Path, path_2: Path, schema: int
) -> None:
    async with SqliteJobs({1: path, 2: path_2}[schema]) as store:
        assert await store.active_jobs() == []
        await add_dataset(store)
        job = await create(store)
        assert await store.jobs("acme", limit=9) == [job]


async def test_jobs_of_a_file_that_counted_none_keep_their_numbers_and_new_ones_get_others(
    tmp_path: Path,
) -> None:
    path = tmp_path / "db"
    async with SqliteJobs(path) as store:
        await add_dataset(store)
        made = [await create(store) for _ in range(3)]
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("DELETE FROM counter WHERE name = 'job'")  # as it was before
    async with SqliteJobs(path) as store:
        newer = await create(store)
        assert await store.jobs("acme", limit=9) == [newer, *reversed(made)]
    assert [job.number for job in (*made, newer)] == [1, 2, 3, 4]


async def test_jobs_of_schema_3_are_what_they_were_and_have_nothing_to_recover_from(
    path_3: Path,
) -> None:
    before = dump(path_3)
    async with SqliteJobs(path_3) as store:
        one, two = await store.job("acme", "one"), await store.job("acme", "two")
        assert (one.state, one.intent, one.epoch) == (JobState.RUNNING, Intent.CANCEL, 4)
        assert (one.attempt, one.device, one.ingested_bytes) == (1, "cpu", 70)
        assert (one.progress, one.notices) == ({"step": 1}, [{"code": "N"}])
        assert two.error == {"reason": "TRAINER_LOST"}
        assert one.recovery == two.recovery == {}
        events = await store.job_events("acme", "one", after=0, limit=9)
        assert [event.sequence for event in events] == [1, 2, 3, 4, 5]
        assert await store.active_jobs() == [one.key]
        paused = JobChange(state=JobState.PAUSING, recovery={"spent": 1})
        assert (await store.change_job(one, paused)).recovery == {"spent": 1}
        assert (await create(store, new_job("three", dataset="sea"))).number == 3
    assert (before[0], dump(path_3)[0]) == ("(3,)", "(5,)")


async def test_jobs_of_schema_4_have_no_priority_and_nobody_had_a_device(path_4: Path) -> None:
    before = dump(path_4)
    async with SqliteJobs(path_4, clock_ns=clock_ns) as store:
        jobs = await store.jobs("acme", limit=9)
        assert [(job.priority, job.queue_time_ns, job.device_time_ns) for job in jobs] == [
            (0, None, None)
        ] * 3
        assert [job.recovery for job in jobs] == [{"spent": 1}, {}, {}]
        assert await store.device_uses() == []
        three, _, one = jobs
        await store.change_job(one, JobChange(state=JobState.CANCELLING))  # it ran before
        assert await store.device_uses() == []
        started = await store.change_job(three, JobChange(state=JobState.PREPARING))
        assert started.device_time_ns == NOW_NS
        assert await store.device_uses() == [DeviceUse("acme", 0, grant_time_ns=NOW_NS)]
    assert (before[0], dump(path_4)[0]) == ("(4,)", "(5,)")


@pytest.mark.parametrize("schema", [3, 4])
@pytest.mark.parametrize("failing", ["ALTER TABLE job ADD COLUMN device", "CREATE TABLE", "\n"])
async def test_a_migration_that_fails_leaves_schemas_3_and_4(
    path_3: Path, path_4: Path, monkeypatch: pytest.MonkeyPatch, schema: int, failing: str
) -> None:
    path = {3: path_3, 4: path_4}[schema]
    before = dump(path)
    with monkeypatch.context() as patch, pytest.raises(RegistryUnusable):
        kept, _, _ = QUEUE_SCHEMA.rpartition(failing)  # "\n": all of it
        patch.setattr(sqlite_schema, "QUEUE_SCHEMA", f"{kept}; FAIL")
        async with SqliteJobs(path):
            pass
    assert dump(path) == before


async def test_a_migration_that_fails_early_leaves_schema_3(
    path_3: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = dump(path_3)
    with monkeypatch.context() as patch, pytest.raises(RegistryUnusable):
        patch.setattr(sqlite_schema, "RECOVERY_SCHEMA", f"{RECOVERY_SCHEMA}; FAIL")
        async with SqliteJobs(path_3):
            pass
    assert dump(path_3) == before


@pytest.mark.parametrize("failing", ["CREATE TABLE dataset", "CREATE TABLE job_event", "\n"])
async def test_a_migration_that_fails_leaves_schema_2(
    path_2: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    before = dump(path_2)
    with monkeypatch.context() as patch, pytest.raises(RegistryUnusable):
        kept, _, _ = JOB_SCHEMA.rpartition(failing)  # "\n": all of it
        patch.setattr(sqlite_schema, "JOB_SCHEMA", f"{kept}; FAIL")
        async with SqliteJobs(path_2):
            pass
    assert dump(path_2) == before
    async with SqliteJobs(path_2) as store:
        assert await store.active_jobs() == []
