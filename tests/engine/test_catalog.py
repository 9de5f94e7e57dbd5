"""A version from its source to READY or FAILED: what is kept, loaded, shown, and what is not."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import pytest

from engine.catalog import GATEWAY, INTERNAL_FINDING
from engine.errors import (
    AdapterInvalid,
    AdapterLoadFailed,
    AdapterNotChecked,
    AdapterQuarantined,
    GenerationFailed,
    PoisonRequest,
    ProbeFailed,
    ShardUnavailable,
    TrialFailed,
)
from engine.generation import ServedVersion
from engine.intake import GONE_FINDING, Announced
from engine.shard import Shard
from store.artifacts import WEIGHTS_FILE
from store.records import Arm, NewVersion, RequestIdReused, VersionNotReady, VersionState
from store.sources import SourceNotAllowed
from store.uploads import UploadUnknown
from tests.engine.drafts import configure
from tests.engine.library import ME, TENANT, Library, ScriptedProbe, happens, key, library

TOO_WIDE = configure(r=4)
"""The tensors have a higher rank."""


@pytest.fixture
async def at(tmp_path: Path) -> AsyncIterator[Library]:
    async with library(tmp_path) as at:
        yield at


async def test_a_version_is_begun_at_once_and_ready_when_it_was_probed(at: Library) -> None:
    at.probe.may_answer.clear()
    record = await at.create(at.source("one"))
    assert (record.version, record.state) == (1, VersionState.VALIDATING)
    await happens(lambda: at.probe.probed)
    assert at.ledger.view.tenants[TENANT]["sql"].ready == ()
    at.probe.may_answer.set()
    record = await at.catalog.settled(record)
    assert record.state is VersionState.READY
    assert record.content is not None and record.content.rank == 8
    assert record.content.target_modules == ("q_proj", "v_proj")
    assert at.digests == {record.content.digest} and not at.staged
    served = at.ledger.view.tenants[TENANT]["sql"]
    assert served.ready == (1,) and served.split.arms == (Arm(1, 100),)
    (probed,) = at.probe.probed
    assert probed.path == str(at.root / "state" / "adapters" / record.content.digest)
    async with at.pool.route(TENANT, "sql", None, "session").lease() as version:
        assert version == probed
    assert set(at.catalog.places(key(1))) == {"shard-0"}
    assert at.catalog.places(key(2)) == {}


async def test_the_same_request_again_makes_and_checks_nothing(at: Library) -> None:
    at.probe.may_answer.clear()
    source = at.source("one")
    first, second = await asyncio.gather(at.create(source, "r1"), at.create(source, "r1"))
    assert first == second
    at.probe.may_answer.set()
    await at.catalog.settled(first)
    again = await at.create(source, "r1")
    assert again.state is VersionState.READY and again.version == 1
    assert len(at.probe.probed) == 1
    with pytest.raises(RequestIdReused):
        await at.create(at.source("two"), "r1")


async def test_what_is_no_source_gets_no_number(at: Library, tmp_path: Path) -> None:
    with pytest.raises(SourceNotAllowed):
        await at.create(str(tmp_path / "elsewhere"))
    with pytest.raises(AdapterInvalid, match="neither an absolute path nor a URL"):
        await at.create("one")
    assert await at.registry.snapshot() == []


async def test_a_broken_adapter_fails_with_its_findings_and_leaves_nothing(at: Library) -> None:
    record = await at.create(at.source("one", TOO_WIDE))
    with pytest.raises(AdapterInvalid, match="other shapes") as caught:
        await at.catalog.settled(record)
    assert (caught.value.adapter, caught.value.version) == ("sql", 1)
    failed = await at.registry.version(*key(1))
    assert failed.state is VersionState.FAILED and failed.findings == caught.value.findings
    assert not at.digests and not at.staged
    assert at.core.loads == [] and at.probe.probed == []


async def test_what_the_probe_finds_takes_it_out_of_the_engine_and_the_store(at: Library) -> None:
    at.probe.says[key(1)] = ["it answers in NaN"]
    with pytest.raises(AdapterInvalid, match="it answers in NaN"):
        await at.make_ready(at.source("one"))
    assert await at.state(1) is VersionState.FAILED
    assert at.core.keys == set() and at.core.loads == [key(1)] and not at.digests


async def test_what_the_engine_refuses_twice_fails(at: Library) -> None:
    at.core.refusals[key(1)] = 2
    with pytest.raises(AdapterInvalid, match="the engine refuses it: shapes do not match"):
        await at.make_ready(at.source("one"))
    assert at.core.loads == [key(1)] * 2 and not at.digests


class CuriousProbe(ScriptedProbe):
    """Asks the catalog for what it probes, as a load would that came just then."""

    def __init__(self, at: Library) -> None:
        super().__init__()
        self._catalog = at.catalog
        self.found: list[ServedVersion] = []

    async def findings(self, version: ServedVersion, shard: Shard) -> list[str]:
        self.found.append(await self._catalog.find(version.key))
        return await super().findings(version, shard)


async def test_a_candidate_keeps_the_id_that_a_second_attempt_got(at: Library) -> None:
    probe = CuriousProbe(at)
    at.catalog.serve_on({"shard-0": at.residency}, at.pool, probe)  # type: ignore[dict-item]
    at.core.refusals[key(1)] = 1
    record = await at.make_ready(at.source("one"))
    assert probe.found == probe.probed, "the first id may name half an adapter"
    assert record.lora_int_id == probe.probed[0].lora_int_id


async def test_what_we_made_ourselves_is_tried_besides_and_ready_after_that(at: Library) -> None:
    record = await at.make_ready(at.own("one"))
    ((tried, version, shard),) = at.trial.tried
    assert (tried.version, tried.state, tried.source_uri) == (
        1,
        VersionState.VALIDATING,
        "train:one",
    )
    assert [version] == at.probe.probed and version.lora_int_id == record.lora_int_id
    assert shard == "shard-0" and record.state is VersionState.READY


async def test_what_callers_name_or_upload_is_not_tried_so(at: Library) -> None:
    await at.make_ready(at.source("one"))
    await at.make_ready(at.upload("two"))
    assert at.trial.tried == []


async def test_what_the_trial_finds_keeps_it_from_everybody(at: Library) -> None:
    at.trial.says[key(1)] = ["the engine says something else"]
    with pytest.raises(TrialFailed, match="the engine says something else"):
        await at.make_ready(at.own("one"))
    assert await at.state(1) is VersionState.FAILED
    assert at.core.keys == set() and not at.digests
    assert at.ledger.view.tenants[TENANT]["sql"].ready == ()


async def test_what_the_probe_finds_is_not_tried_any_more(at: Library) -> None:
    at.probe.says[key(1)] = ["it answers in NaN"]
    with pytest.raises(ProbeFailed, match="it answers in NaN"):
        await at.make_ready(at.own("one"))
    assert at.trial.tried == []


async def test_what_we_made_and_is_gone_fails_and_names_no_folder(at: Library) -> None:
    with pytest.raises(AdapterNotChecked) as caught:
        await at.make_ready("train:nowhere")
    assert caught.value.findings == (GONE_FINDING,)


@pytest.mark.parametrize(
    "error",
    [
        AdapterNotChecked("sql", ["no"]),
        GenerationFailed("no"),
        PoisonRequest(7, 1_800_000_000.0),
        AdapterQuarantined("sql", 1, 1_800_000_000.0, 60.0),
        OSError(errno.EIO, "no"),
        ZeroDivisionError("secret"),
    ],
)
async def test_a_trial_that_cannot_be_held_fails_it_without_blaming_it(
    at: Library, error: Exception
) -> None:
    at.trial.says[key(1)] = error
    with pytest.raises(AdapterNotChecked) as caught:
        await at.make_ready(at.own("one"))
    assert caught.value.version == 1 and "secret" not in str(caught.value)
    assert await at.state(1) is VersionState.FAILED
    assert at.core.keys == set() and not at.digests


async def test_a_load_that_fails_does_not_blame_the_adapter(at: Library) -> None:
    at.core.refusals[key(1)] = 2
    with pytest.raises(AdapterNotChecked, match="the engine refuses it"):
        await at.make_ready(at.source("one"))


async def test_an_upload_is_dropped_once_it_was_looked_at(at: Library) -> None:
    good = await at.create(at.upload("good"))
    at.probe.says[key(2)] = ["it answers in NaN"]
    bad = await at.create(at.upload("bad"))
    await at.catalog.settled(good)
    with pytest.raises(AdapterInvalid):
        await at.catalog.settled(bad)
    for upload_id in ("good", "bad"):
        with pytest.raises(UploadUnknown):
            at.uploads.find(TENANT, upload_id)


async def test_a_full_disk_fails_the_version_and_says_so(
    at: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> NoReturn:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(at.store, "stage", full)
    with pytest.raises(AdapterInvalid, match=r"No space left on device\): create it again later"):
        await at.make_ready(at.source("one"))


async def test_what_nobody_expected_fails_the_version_and_tells_no_internals(at: Library) -> None:
    at.probe.says[key(1)] = ZeroDivisionError("secret")
    with pytest.raises(AdapterInvalid) as caught:
        await at.make_ready(at.source("one"))
    assert caught.value.findings == (INTERNAL_FINDING,)
    assert not at.digests and at.core.keys == set()


async def test_a_shard_that_dies_fails_nothing(at: Library) -> None:
    at.probe.says[key(1)] = ShardUnavailable("shard-0")
    with pytest.raises(ShardUnavailable):
        await at.make_ready(at.source("one"))
    assert await at.state(1) is VersionState.VALIDATING


async def test_a_caller_that_leaves_while_it_asks_stops_nothing(at: Library) -> None:
    source = at.source("one")
    for steps in range(12):
        asking = asyncio.create_task(at.create(source))
        for _ in range(steps):
            await asyncio.sleep(0)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
    await at.ledger.close()  # what was begun has its number
    made = await at.registry.versions(TENANT, "sql", limit=100)
    assert made
    for record in made:
        await at.until(record.version, VersionState.READY)


async def test_validate_keeps_nothing(at: Library) -> None:
    source = at.source("one")
    facts, content = await at.catalog.validate(TENANT, source, Announced())
    assert facts.rank == content.rank == 8
    assert not at.digests and not at.staged and await at.registry.snapshot() == []
    with pytest.raises(AdapterInvalid, match="other shapes"):
        await at.catalog.validate(TENANT, at.source("two", TOO_WIDE), Announced())
    with pytest.raises(AdapterInvalid, match="it is another file, or damaged"):
        await at.catalog.validate(TENANT, source, Announced("0" * 64))


async def test_what_was_announced_is_compared(at: Library) -> None:
    new = NewVersion(
        TENANT, "sql", at.source("one"), "0" * 64, fingerprints={"config_sha256": "1" * 64}
    )
    record = await at.catalog.create(new, request_id="", actor=ME)
    with pytest.raises(AdapterInvalid) as caught:
        await at.catalog.settled(record)
    assert len(caught.value.findings) == 2


def moved(source: str, elsewhere: Path) -> Path:
    """To where only the operator may read."""
    return Path(source).rename(elsewhere)


async def test_an_operators_folder_is_adopted_once(at: Library, tmp_path: Path) -> None:
    folder = moved(at.source("one"), tmp_path / "elsewhere")
    record = await at.catalog.adopt(TENANT, "sql", folder)
    assert record.state is VersionState.READY and record.content is not None
    assert await at.catalog.adopt(TENANT, "sql", folder) == record
    at.store.remove(record.content.digest)
    assert await at.catalog.adopt(TENANT, "sql", folder) == record
    assert at.digests == {record.content.digest}, "files that were gone are there again"
    events = await at.registry.events(TENANT, after=0, limit=10)
    assert {event.actor for event in events} == {GATEWAY}
    copy = moved(at.source("two"), tmp_path / "copy")
    assert (await at.catalog.adopt(TENANT, "sql", copy)).version == 2


async def test_an_operators_folder_that_the_engine_refuses_is_named(at: Library) -> None:
    at.core.refusals[key(1)] = 2
    folder = Path(at.source("one"))
    with pytest.raises(AdapterInvalid, match="the engine refuses it"):
        await at.catalog.adopt(TENANT, "sql", folder)
    assert await at.state(1) is VersionState.FAILED and not at.digests
    assert (await at.catalog.adopt(TENANT, "sql", folder)).version == 2


async def test_damaged_files_are_not_loaded(at: Library) -> None:
    record = await at.make_ready(at.source("one"))
    await at.catalog.unload(key(1))
    assert record.content is not None
    weights = at.root / "state" / "adapters" / record.content.digest / WEIGHTS_FILE
    weights.chmod(0o600)
    weights.write_bytes(b"other bytes")
    with pytest.raises(AdapterLoadFailed, match="were changed after they were stored") as caught:
        await at.catalog.load(key(1))
    assert at.core.keys == set()
    assert str(at.root) not in str(caught.value), "callers read it"
    assert record.content.digest[:12] in str(caught.value)


async def test_traffic_goes_to_what_is_loaded_or_stays(at: Library) -> None:
    for name in ("one", "two", "three"):  # there are two places
        await at.make_ready(at.source(name))
    assert at.core.keys == {key(2), key(3)}
    await at.catalog.promote(key(1), etag="", actor=ME)
    assert key(1) in at.core.keys
    await at.catalog.unload(key(2))
    at.core.refusals[key(2)] = 2
    arms = [Arm(1, 1), Arm(2, 1)]
    with pytest.raises(AdapterLoadFailed, match="version 2 of adapter 'sql' cannot be loaded"):
        await at.catalog.set_traffic(TENANT, "sql", arms, guard=None, etag="", actor=ME)
    assert (await at.registry.adapter(TENANT, "sql")).arms == (Arm(1, 100),)
    adapter = await at.catalog.set_traffic(TENANT, "sql", arms, guard=None, etag="", actor=ME)
    assert adapter.arms == tuple(arms) and key(2) in at.core.keys


async def test_traffic_to_what_is_not_ready_is_refused_in_the_registrys_words(at: Library) -> None:
    at.probe.says[key(1)] = ["it answers in NaN"]
    with pytest.raises(AdapterInvalid):
        await at.make_ready(at.source("one"))
    loads = list(at.core.loads)
    with pytest.raises(VersionNotReady, match="is FAILED, and must be READY"):
        await at.catalog.promote(key(1), etag="", actor=ME)
    with pytest.raises(AdapterLoadFailed, match="it is FAILED"):
        await at.catalog.load(key(1))
    assert at.core.loads == loads


async def test_the_new_id_of_a_version_is_its_id_from_then_on(at: Library) -> None:
    await at.make_ready(at.source("one"))
    found = await at.catalog.find(key(1))
    renamed = await at.catalog.with_new_id(found)
    assert renamed.lora_int_id > found.lora_int_id
    assert renamed == replace(found, lora_int_id=renamed.lora_int_id)
    assert await at.catalog.find(key(1)) == renamed
