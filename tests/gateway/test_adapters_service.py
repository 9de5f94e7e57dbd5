"""Adapters as clients see it: from a source to READY, in and out of engines, to DELETED."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from engine.errors import GenerationFailed
from engine.generation import VersionKey
from lora_gateway.v1 import adapters_pb2 as pb
from lora_gateway.v1.inference_pb2 import ModelFingerprints
from store.artifacts import CONFIG_FILE, WEIGHTS_FILE
from tests.gateway.control_plane import (
    SERVED,
    TENANT,
    WEIGHTS,
    Plane,
    control_plane,
    create,
    named,
    sha256,
)
from tests.gateway.promises import refused

SQL_1 = VersionKey(TENANT, "sql", 1)


@pytest_asyncio.fixture
async def plane(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Plane]:
    async with control_plane(tmp_path, monkeypatch) as plane:
        yield plane


# --- from a source to READY --------------------------------------------------


async def test_a_version_becomes_ready_with_its_facts_and_takes_traffic(plane: Plane) -> None:
    uri = plane.write_source("a")
    request = create(uri, labels={"team": "search"}, expected_sha256=sha256(WEIGHTS))
    begun = (await plane.stub.CreateAdapterVersion(request)).adapter_version
    assert (begun.adapter, begun.version) == ("sql", 1)
    told = await plane.until("sql", 1, pb.VERSION_STATE_READY)
    assert told.weights_sha256 == sha256(WEIGHTS)
    assert told.size_bytes == len(WEIGHTS) + len((Path(uri) / CONFIG_FILE).read_bytes())
    assert (told.rank, list(told.target_modules)) == (8, ["q_proj", "v_proj"])
    assert (told.source_uri, dict(told.labels), told.weight) == (uri, {"team": "search"}, 100)
    assert [residency.shard for residency in told.residency] == ["shard-0"]
    assert plane.shard.loaded == [SQL_1]
    adapter = (await plane.stub.GetAdapter(pb.GetAdapterRequest(adapter="sql"))).adapter
    assert list(adapter.splits) == [pb.TrafficSplit(version=1, weight=100)]


async def test_a_version_that_waits_answers_when_it_is_ready(plane: Plane) -> None:
    plane.shard.may_load.clear()
    request = create(plane.write_source("a"), wait=True, no_traffic=True)
    answer = asyncio.ensure_future(plane.stub.CreateAdapterVersion(request))
    await plane.until("sql", 1, pb.VERSION_STATE_VALIDATING)
    assert not (await asyncio.wait([answer], timeout=0.1))[0]
    plane.shard.may_load.set()
    version = (await answer).adapter_version
    assert (version.state, version.weight) == (pb.VERSION_STATE_READY, 0)


async def test_a_caller_who_leaves_does_not_end_a_validation(plane: Plane) -> None:
    plane.shard.may_load.clear()
    answer = plane.stub.CreateAdapterVersion(create(plane.write_source("a"), wait=True))
    await plane.until("sql", 1, pb.VERSION_STATE_VALIDATING)
    answer.cancel()
    plane.shard.may_load.set()
    await plane.until("sql", 1, pb.VERSION_STATE_READY)


async def test_a_request_id_makes_one_version_however_often_it_comes(plane: Plane) -> None:
    request = create(plane.write_source("a"), request_id="nightly", wait=True)
    answers = await asyncio.gather(*(plane.stub.CreateAdapterVersion(request) for _ in range(5)))
    assert {answer.adapter_version.version for answer in answers} == {1}
    assert (await plane.stub.CreateAdapterVersion(request)).adapter_version.version == 1
    other = create(plane.write_source("b"), request_id="nightly")
    refusal = await refused(plane.stub.CreateAdapterVersion(other))
    assert refusal.reason == "REQUEST_ID_REUSED"
    assert refusal.metadata == {"request_id": "nightly"}
    request.request_id = ""
    assert (await plane.stub.CreateAdapterVersion(request)).adapter_version.version == 2


async def test_a_validation_that_a_stop_interrupted_goes_on_at_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with control_plane(tmp_path, monkeypatch) as plane:
        plane.shard.may_load.clear()
        await plane.stub.CreateAdapterVersion(create(plane.write_source("a")))
        await plane.until("sql", 1, pb.VERSION_STATE_VALIDATING)
    async with control_plane(tmp_path, monkeypatch) as plane:
        assert (await plane.until("sql", 1, pb.VERSION_STATE_READY)).weight == 100


@pytest.mark.parametrize("wait", [True, False])
async def test_a_version_that_is_refused_tells_all_findings(wait: bool, plane: Plane) -> None:
    findings = [f"finding {number}: do this" for number in range(3)]
    request = create(plane.write_source("bad", findings=findings), wait=wait)
    if wait:
        refusal = await refused(plane.stub.CreateAdapterVersion(request))
        assert refusal.reason == "ADAPTER_INVALID"
        assert refusal.metadata == {"adapter": "sql", "version": "1"}
        told = [v.description for v in refusal.details["BadRequest"].field_violations]
        assert told == findings
        assert findings[0] in refusal.message
    else:
        await plane.stub.CreateAdapterVersion(request)
    failed = await plane.until("sql", 1, pb.VERSION_STATE_FAILED)
    assert list(failed.findings) == findings
    assert not plane.shard.loaded


@pytest.mark.parametrize("spoilt", ["probe", "load", "sha256", "fingerprint", "files"])
async def test_whatever_is_found_on_the_way_fails_the_version_and_leaves_nothing(
    spoilt: str, plane: Plane
) -> None:
    uri, fields = plane.write_source("a"), dict[str, Any]()
    match spoilt:
        case "probe":
            plane.shard.ignores.add("sql")
        case "load":
            plane.shard.refuses[SQL_1] = GenerationFailed("shapes do not fit")
        case "sha256":
            fields["expected_sha256"] = "0" * 64
        case "fingerprint":
            fields["fingerprints"] = ModelFingerprints(config_sha256="0" * 64)
        case "files":
            (Path(uri) / WEIGHTS_FILE).unlink()
    refusal = await refused(plane.stub.CreateAdapterVersion(create(uri, wait=True, **fields)))
    assert refusal.reason == "ADAPTER_INVALID"
    words = {
        "probe": "changes nothing",
        "load": "shapes do not fit",
        "sha256": "it is another file",
        "fingerprint": SERVED.config_sha256,
        "files": WEIGHTS_FILE,
    }
    failed = await plane.until("sql", 1, pb.VERSION_STATE_FAILED)
    assert words[spoilt] in " ".join(failed.findings)
    assert not plane.shard.loaded
    assert not list((plane.sources.parent / "state" / "adapters").iterdir())
    plane.shard.ignores.clear()
    plane.shard.refuses.clear()
    assert (await plane.ready()).weight == 100, "the first READY version takes the traffic"


async def test_a_check_keeps_nothing(plane: Plane) -> None:
    good = pb.ValidateAdapterRequest(source_uri=plane.write_source("a"))
    answer = await plane.stub.ValidateAdapter(good)
    assert answer.valid and not answer.findings
    assert answer.facts.weights_sha256 == sha256(WEIGHTS)
    findings = [str(number) for number in range(100)]
    bad = pb.ValidateAdapterRequest(source_uri=plane.write_source("b", findings=findings))
    answer = await plane.stub.ValidateAdapter(bad)
    assert not answer.valid and not answer.HasField("facts")
    assert list(answer.findings) == findings[:64]
    assert not (await plane.stub.ListAdapters(pb.ListAdaptersRequest())).adapters


# --- reading -----------------------------------------------------------------


async def test_adapters_come_page_by_page(plane: Plane) -> None:
    for name in ("a", "b-1", "b-2", "b-3", "c"):
        await plane.ready(name)
    names, token = [], ""
    while True:
        request = pb.ListAdaptersRequest(page_size=2, page_token=token, prefix="b-")
        page = await plane.stub.ListAdapters(request)
        names.append([adapter.adapter for adapter in page.adapters])
        if not (token := page.next_page_token):
            break
    assert names == [["b-1", "b-2"], ["b-3"]]
    whole = await plane.stub.ListAdapters(pb.ListAdaptersRequest(page_size=5))
    assert len(whole.adapters) == 5 and not whole.next_page_token, "it ends where the page does"


async def test_versions_come_newest_first_page_by_page(plane: Plane) -> None:
    for _ in range(5):
        await plane.ready()
    await plane.stub.DeleteAdapterVersion(named(pb.DeleteAdapterVersionRequest, version=2))
    pages, token = [], ""
    while True:
        request = pb.ListAdapterVersionsRequest(adapter="sql", page_size=2, page_token=token)
        page = await plane.stub.ListAdapterVersions(request)
        pages.append([version.version for version in page.adapter_versions])
        if not (token := page.next_page_token):
            break
    assert pages == [[5, 4], [3, 1]]
    everything = pb.ListAdapterVersionsRequest(adapter="sql", show_deleted=True)
    shown = (await plane.stub.ListAdapterVersions(everything)).adapter_versions
    assert [(v.version, v.weight, bool(v.residency)) for v in shown] == [
        *((5, 0, True), (4, 0, True), (3, 0, True), (2, 0, False), (1, 100, True))
    ]


# --- engines -----------------------------------------------------------------


async def test_a_version_is_unloaded_and_loaded_on_demand(plane: Plane) -> None:
    await plane.ready()
    for _ in range(2):
        request = named(pb.UnloadAdapterVersionRequest)
        unloaded = (await plane.stub.UnloadAdapterVersion(request)).adapter_version
        assert (unloaded.state, len(unloaded.residency)) == (pb.VERSION_STATE_READY, 0)
        assert plane.shard.loaded == []
    for _ in range(2):
        request = named(pb.LoadAdapterVersionRequest)
        loaded = (await plane.stub.LoadAdapterVersion(request)).adapter_version
        assert [residency.shard for residency in loaded.residency] == ["shard-0"]
        assert plane.shard.loaded == [SQL_1]


async def test_damaged_files_fail_the_load_and_nothing_else(plane: Plane) -> None:
    await plane.ready()
    await plane.stub.UnloadAdapterVersion(named(pb.UnloadAdapterVersionRequest))
    (stored,) = (plane.sources.parent / "state" / "adapters").iterdir()
    stored.chmod(0o700)
    shutil.rmtree(stored)
    await plane.ready("other")
    refusal = await refused(plane.stub.LoadAdapterVersion(named(pb.LoadAdapterVersionRequest)))
    assert refusal.reason == "ADAPTER_LOAD_FAILED"
    assert refusal.metadata == {"adapter": "sql", "version": "1"}
    assert "restore them" in refusal.message
    assert (await plane.until("sql", 1, pb.VERSION_STATE_READY)).weight == 100


# --- deletion ----------------------------------------------------------------


async def test_a_deletion_answers_when_nothing_is_left(plane: Plane) -> None:
    await plane.ready()
    await plane.ready()
    adapters = plane.sources.parent / "state" / "adapters"
    assert len(list(adapters.iterdir())) == 2
    request = named(pb.DeleteAdapterVersionRequest, version=2)
    for _ in range(2):
        deleted = (await plane.stub.DeleteAdapterVersion(request)).adapter_version
        assert deleted.state == pb.VERSION_STATE_DELETED
    assert plane.shard.loaded == [SQL_1]
    assert len(list(adapters.iterdir())) == 1
    assert (await plane.ready()).version == 3, "a number is never used again"


async def test_a_version_that_failed_can_be_deleted(plane: Plane) -> None:
    await refused(
        plane.stub.CreateAdapterVersion(create(plane.write_source("a", findings=["x"]), wait=True))
    )
    answer = await plane.stub.DeleteAdapterVersion(named(pb.DeleteAdapterVersionRequest))
    assert answer.adapter_version.state == pb.VERSION_STATE_DELETED
