"""The registry: versions and ids that are stable while they live and never come back."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sqlite3
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from store import registry as registry_module
from store.registry import InvalidName, Registry, RegistryUnusable, VersionRecord, VersionUnknown

ONE, TWO, THREE = "1" * 64, "2" * 64, "3" * 64
ROOT = Path(__file__).parents[2]
REGISTER_AND_DIE = """
import asyncio, os, signal, sys
from pathlib import Path
from store.registry import Registry

async def main():
    registry = Registry(Path(sys.argv[1]))
    await registry.open()
    await registry.register("default", "sql", "1" * 64)
    os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(main())
"""


def forget(path: Path, sql: str) -> None:
    """As a later release may delete: rows go, counters stay."""
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(sql)


async def test_a_version_is_registered_with_all_that_is_known_of_it(tmp_path: Path) -> None:
    async with Registry(tmp_path / "db", clock_ns=lambda: 1_700_000_000_000_000_001) as registry:
        record = await registry.register("default", "sql", ONE)
    assert record == VersionRecord("default", "sql", 1, ONE, 1, 1_700_000_000_000_000_001)


async def test_versions_count_up_for_each_adapter_and_ids_over_all(tmp_path: Path) -> None:
    async with Registry(tmp_path / "db") as registry:
        records = [
            await registry.register("default", "sql", ONE),
            await registry.register("default", "sql", TWO),
            await registry.register("default", "chat", ONE),
            await registry.register("acme", "sql", ONE),
        ]
    assert [record.version for record in records] == [1, 2, 1, 1]
    assert [record.lora_int_id for record in records] == [1, 2, 3, 4]


async def test_the_same_files_are_the_same_version(tmp_path: Path) -> None:
    async with Registry(tmp_path / "db") as registry:
        first = await registry.register("default", "sql", ONE)
        await registry.register("default", "sql", TWO)
        assert await registry.register("default", "sql", ONE) == first


async def test_everything_is_as_it_was_after_a_restart(tmp_path: Path) -> None:
    async with Registry(tmp_path / "db") as registry:
        first = await registry.register("default", "sql", ONE)
    async with Registry(tmp_path / "db") as registry:
        assert await registry.register("default", "sql", ONE) == first
        assert (await registry.register("default", "sql", TWO)).lora_int_id == 2


async def test_numbers_of_deleted_versions_never_come_back(tmp_path: Path) -> None:
    async with Registry(tmp_path / "db") as registry:
        await registry.register("default", "sql", ONE)
        await registry.register("default", "sql", TWO)
    forget(tmp_path / "db", "DELETE FROM adapter_version")
    async with Registry(tmp_path / "db") as registry:
        record = await registry.register("default", "sql", TWO)
    assert (record.version, record.lora_int_id) == (3, 3)


async def test_a_fresh_id_replaces_the_old_one_for_good(tmp_path: Path) -> None:
    async with Registry(tmp_path / "db") as registry:
        await registry.register("default", "sql", ONE)
        assert await registry.mint_lora_int_id("default", "sql", 1) == 2
        assert await registry.mint_lora_int_id("default", "sql", 1) == 3
        assert (await registry.register("default", "sql", ONE)).lora_int_id == 3
        assert (await registry.register("default", "sql", TWO)).lora_int_id == 4


async def test_a_fresh_id_for_an_unknown_version_is_refused_and_used_up_by_nobody(
    tmp_path: Path,
) -> None:
    async with Registry(tmp_path / "db") as registry:
        with pytest.raises(VersionUnknown, match="default/sql has no version 1"):
            await registry.mint_lora_int_id("default", "sql", 1)
        assert (await registry.register("default", "sql", ONE)).lora_int_id == 1


async def test_callers_at_once_get_one_version_for_one_content(tmp_path: Path) -> None:
    async with Registry(tmp_path / "db") as registry:
        records = await asyncio.gather(
            *(
                registry.register("default", "sql", digest)
                for _ in range(20)
                for digest in (ONE, TWO, THREE)
            )
        )
    assert len(set(records)) == 3
    assert {record.version for record in records} == {1, 2, 3}
    assert {record.lora_int_id for record in records} == {1, 2, 3}


@pytest.mark.parametrize("name", ["", "SQL", "-sql", ".sql", "a/b", "a b", "a\n", "é", "a" * 64])
async def test_a_name_against_the_rules_is_refused(tmp_path: Path, name: str) -> None:
    async with Registry(tmp_path / "db") as registry:
        with pytest.raises(InvalidName, match=r"adapter .* is no valid name; use 1 to 63"):
            await registry.register("default", name, ONE)
        with pytest.raises(InvalidName, match=r"tenant .* is no valid name"):
            await registry.register(name, "sql", ONE)


@pytest.mark.parametrize("name", ["a", "0", "my-adapter_v1.2", "a" * 63])
async def test_a_name_by_the_rules_is_taken(tmp_path: Path, name: str) -> None:
    async with Registry(tmp_path / "db") as registry:
        assert (await registry.register(name, name, ONE)).adapter == name


async def test_only_a_digest_is_registered(tmp_path: Path) -> None:
    async with Registry(tmp_path / "db") as registry:
        with pytest.raises(ValueError, match="not a digest"):
            await registry.register("default", "sql", "latest")


async def test_what_was_registered_survives_a_kill(tmp_path: Path) -> None:
    command = [sys.executable, "-c", REGISTER_AND_DIE, str(tmp_path / "db")]
    process = await asyncio.create_subprocess_exec(*command, cwd=ROOT)
    assert await process.wait() == -signal.SIGKILL
    async with Registry(tmp_path / "db") as registry:
        assert (await registry.register("default", "sql", ONE)).version == 1
        assert (await registry.register("default", "sql", TWO)).lora_int_id == 2


def test_a_commit_is_on_disk_before_it_is_acknowledged(tmp_path: Path) -> None:
    with contextlib.closing(registry_module._connect(tmp_path / "db")) as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        assert connection.execute("PRAGMA synchronous").fetchone() == (2,)  # FULL


@pytest.mark.parametrize("failing", [1, 2, 3, 4])
async def test_a_statement_that_fails_leaves_nothing_of_its_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    body: Callable[..., VersionRecord] = registry_module._register

    class FailingConnection:
        """Passes statements on, and fails the n-th."""

        def __init__(self, connection: sqlite3.Connection) -> None:
            self._connection = connection
            self._left = failing

        def execute(self, *arguments: object) -> sqlite3.Cursor:
            self._left -= 1
            if not self._left:
                raise sqlite3.OperationalError("disk I/O error")
            return self._connection.execute(*arguments)  # type: ignore[arg-type]

    def register(connection: sqlite3.Connection, *arguments: object) -> VersionRecord:
        return body(FailingConnection(connection), *arguments)

    async with Registry(tmp_path / "db") as registry:
        await registry.register("default", "sql", ONE)
        with monkeypatch.context() as patch, pytest.raises(sqlite3.OperationalError):
            patch.setattr(registry_module, "_register", register)
            await registry.register("default", "sql", TWO)
        record = await registry.register("default", "sql", TWO)
    assert (record.version, record.lora_int_id) == (2, 2)


async def test_a_file_that_is_no_database_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "db").write_bytes(b"something else" * 100)
    with pytest.raises(RegistryUnusable, match="restore it from a backup"):
        async with Registry(tmp_path / "db"):
            pass
    assert (tmp_path / "db").read_bytes() == b"something else" * 100


async def test_a_registry_of_a_newer_release_is_refused(tmp_path: Path) -> None:
    async with Registry(tmp_path / "db"):
        pass
    forget(tmp_path / "db", "PRAGMA user_version = 2")
    with pytest.raises(RegistryUnusable, match="has schema 2, and this release knows 1"):
        async with Registry(tmp_path / "db"):
            pass


async def test_a_call_before_open_is_our_bug(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "db")
    with pytest.raises(RuntimeError, match="not open"):
        await registry.register("default", "sql", ONE)
    await registry.close()


async def test_closing_twice_is_fine(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "db")
    await registry.open()
    await registry.close()
    await registry.close()


async def test_closing_waits_for_what_runs(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "db")
    await registry.open()
    pending = asyncio.create_task(registry.register("default", "sql", ONE))
    await asyncio.sleep(0)
    await registry.close()
    assert (await pending).version == 1
