"""The control plane as its host drives it: what workers ask, what the operator names, its end."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from pathlib import Path

import pytest
from prometheus_client import REGISTRY

from engine.errors import AdapterInvalid, ShardUnavailable
from engine.generation import VersionKey
from gateway import upload_sweep
from gateway.messages import Want
from gateway.upload_sweep import UploadSweep
from lora_gateway.v1 import adapters_pb2 as pb
from store.artifacts import Artifact, StagedArtifact
from store.upload_folder import StorageFull
from tests.gateway.control_plane import TENANT, TIMEOUT_S, Plane, control_plane

SQL_1 = VersionKey(TENANT, "sql", 1)
CLOSE_S = 3.0
"""What a close may take; a load that hangs takes a minute."""


def create(plane: Plane, name: str = "a") -> pb.CreateAdapterVersionRequest:
    return pb.CreateAdapterVersionRequest(adapter="sql", source_uri=plane.write_source(name))


def resident_metric() -> float | None:
    return REGISTRY.get_sample_value("adapters_resident", {"shard": "shard-0"})


async def test_a_store_that_fails_does_not_end_the_gateway(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    failures: list[Exception] = [
        sqlite3.OperationalError("disk I/O error"),
        StorageFull("full"),
        OSError("gone"),
    ]

    async def sweep(_: UploadSweep) -> None:
        if failures:
            raise failures.pop()
        swept.set()

    swept = asyncio.Event()
    monkeypatch.setattr(upload_sweep, "SWEEP_INTERVAL_S", 0.01)
    monkeypatch.setattr(UploadSweep, "sweep", sweep)
    sweeping = asyncio.create_task(object.__new__(UploadSweep).run())
    await asyncio.wait_for(swept.wait(), TIMEOUT_S)
    sweeping.cancel()


# --- workers -----------------------------------------------------------------


async def test_a_version_that_a_worker_waits_for_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with control_plane(tmp_path, monkeypatch) as plane:
        await plane.ready()
        request = pb.UnloadAdapterVersionRequest(adapter="sql", version=1)
        await plane.stub.UnloadAdapterVersion(request)
        assert plane.control.resident == {"shard-0": []}
        plane.control.hear(Want("shard-0", SQL_1))
        async with asyncio.timeout(TIMEOUT_S):
            while not plane.shard.loaded:
                await asyncio.sleep(0.01)
        assert [version.key for version in plane.control.resident["shard-0"]] == [SQL_1]


async def test_a_worker_that_joins_learns_of_all_adapters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with control_plane(tmp_path, monkeypatch) as plane:
        await plane.ready()
        await plane.ready(no_traffic=True)
        before = plane.control.view
    async with control_plane(tmp_path, monkeypatch) as plane:
        served = plane.control.view.tenants[TENANT]["sql"]
        assert served.ready == before.tenants[TENANT]["sql"].ready == (1, 2)
        assert plane.control.view.resolve(TENANT, "sql", None, "session") == SQL_1


async def test_the_metric_of_residents_follows_loads_and_removals(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with control_plane(tmp_path, monkeypatch) as plane:
        assert resident_metric() == 0
        await plane.ready()
        await plane.ready()
        assert resident_metric() == 2
        request = pb.UnloadAdapterVersionRequest(adapter="sql", version=1)
        await plane.stub.UnloadAdapterVersion(request)
        assert resident_metric() == 1


async def test_no_more_is_loaded_than_has_a_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with control_plane(tmp_path, monkeypatch, max_loras=2, max_cpu_loras=2) as plane:
        for _ in range(4):
            await plane.ready()
            assert len(plane.shard.loaded) <= 2
        assert [key.version for key in plane.shard.loaded] == [3, 4], "the idle ones went"


# --- adapters of the operator ------------------------------------------------


async def test_a_folder_of_the_operator_becomes_one_version_however_often(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with control_plane(tmp_path, monkeypatch) as plane:
        first, second = (Path(plane.write_source(name)) for name in ("a", "b"))
        for _ in range(2):
            await plane.control.adopt("sql", first)
        assert plane.shard.loaded == [SQL_1]
        assert "has no traffic" not in caplog.text
        await plane.control.adopt("sql", second)
        assert [key.version for key in plane.shard.loaded] == [1, 2]
        assert "adapters promote sql 2" in caplog.text, "the split is the operator's"


async def test_a_folder_that_cannot_be_served_is_refused_before_and_after_the_core_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with control_plane(tmp_path, monkeypatch) as plane:
        bad = Path(plane.write_source("bad", findings=["rank 512 is too high"]))
        for refuse in (plane.control.check, plane.control.adopt):
            with pytest.raises(AdapterInvalid, match="rank 512"):
                await refuse("sql", bad)
        useless = Path(plane.write_source("useless"))
        plane.shard.ignores.add("sql")
        with pytest.raises(AdapterInvalid, match="changes nothing"):
            await plane.control.adopt("sql", useless)
        assert not plane.shard.loaded


# --- the end -----------------------------------------------------------------


async def test_closing_does_not_wait_for_a_load_that_hangs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with control_plane(tmp_path, monkeypatch) as plane:
        plane.shard.may_load.clear()
        await plane.stub.CreateAdapterVersion(create(plane))
        await plane.shard.loading.wait()
        async with asyncio.timeout(CLOSE_S):
            await plane.control.close()
    async with control_plane(tmp_path, monkeypatch) as plane:
        assert (await plane.until("sql", 1, pb.VERSION_STATE_READY)).weight == 100


async def test_what_comes_to_its_load_after_the_end_does_not_wait_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with control_plane(tmp_path, monkeypatch) as plane:
        version = await plane.ready()
        request = pb.UnloadAdapterVersionRequest(adapter="sql", version=1)
        await plane.stub.UnloadAdapterVersion(request)
        await plane.control.close()
        async with asyncio.timeout(CLOSE_S):
            with pytest.raises(ShardUnavailable):
                await plane.control.adopt("sql", Path(version.source_uri))


async def test_closing_waits_for_files_that_are_being_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dropped meanwhile, half of them would stand for their digest for ever."""
    begun, may_go_on = threading.Event(), threading.Event()
    whole: list[bool] = []
    commit = StagedArtifact.commit

    def slow_commit(staged: StagedArtifact) -> Artifact:
        begun.set()
        assert may_go_on.wait(TIMEOUT_S)
        whole.append(staged.path.is_dir())
        return commit(staged)

    with monkeypatch.context() as patched:
        patched.setattr(StagedArtifact, "commit", slow_commit)
        async with control_plane(tmp_path, monkeypatch) as plane:
            await plane.stub.CreateAdapterVersion(create(plane))
            assert await asyncio.to_thread(begun.wait, TIMEOUT_S)
            closing = asyncio.create_task(plane.control.close())
            assert not (await asyncio.wait([closing], timeout=0.3))[0]
            may_go_on.set()
            await closing
    assert whole == [True]
    async with control_plane(tmp_path, monkeypatch) as plane:
        assert (await plane.until("sql", 1, pb.VERSION_STATE_READY)).weight == 100


async def test_a_deletion_that_a_stop_interrupted_goes_on_at_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with control_plane(tmp_path, monkeypatch) as plane:
        await plane.ready()
        await plane.ready()
        await plane.registry.drain_version(TENANT, "sql", 2, actor="test")
    async with control_plane(tmp_path, monkeypatch) as plane:
        await plane.until("sql", 2, pb.VERSION_STATE_DELETED)
        async with asyncio.timeout(TIMEOUT_S):
            while len(list((tmp_path / "state" / "adapters").iterdir())) > 1:
                await asyncio.sleep(0.01)
