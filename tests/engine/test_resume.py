"""What one start was cut off in, the next one ends: new objects on the same folder.

A crash is what the registry and the disk hold at that moment, so it is written there directly;
`tests/store/crash` kills real processes.
"""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import pytest

from engine.errors import AdapterInvalid
from store.artifacts import WEIGHTS_FILE
from store.records import EventKind, NewVersion, VersionState
from store.sqlite_registry import SqliteRegistry
from tests.engine.drafts import configure
from tests.engine.library import ME, TENANT, Library, happens, key, library


async def crash_in_validation(root: Path, source_uri: str) -> None:
    async with SqliteRegistry(root / "registry.sqlite") as registry:
        await registry.begin_version(
            NewVersion(TENANT, "sql", source_uri), request_id="r1", actor=ME
        )


async def crash_in_deletion(root: Path, version: int) -> None:
    async with SqliteRegistry(root / "registry.sqlite") as registry:
        await registry.set_traffic(TENANT, "sql", [], actor=ME)
        await registry.drain_version(*key(version), actor=ME)


async def make_ready(root: Path, name: str = "one", count: int = 1) -> str:
    """READY versions of one source, in a start that ends in order."""
    async with library(root) as at:
        source = at.source(name)
        for _ in range(count):
            await at.make_ready(source)
    return source


async def test_a_validation_goes_on(tmp_path: Path) -> None:
    async with library(tmp_path) as at:
        source = at.source("one")
    await crash_in_validation(tmp_path, source)
    async with library(tmp_path) as at:
        await at.catalog.resume()
        again = await at.create(source, "r1")
        assert again.version == 1, "the caller that asks again finds it"
        record = await at.catalog.settled(again)
        assert record.state is VersionState.READY
        assert len(at.probe.probed) == 1 and at.core.keys == {key(1)}
        assert at.ledger.view.tenants[TENANT]["sql"].ready == (1,)


@pytest.mark.parametrize("says", [[], ["the engine says something else"]])
async def test_a_validation_of_what_we_made_goes_on_with_its_trial(
    tmp_path: Path, says: list[str]
) -> None:
    async with library(tmp_path) as at:
        source = at.own("one")
    await crash_in_validation(tmp_path, source)
    async with library(tmp_path) as at:
        at.trial.says[key(1)] = says
        await at.catalog.resume()
        await at.until(1, VersionState.FAILED if says else VersionState.READY)
        assert [record.version for record, _, _ in at.trial.tried] == [1]


async def test_a_validation_goes_on_over_files_that_were_kept_before(tmp_path: Path) -> None:
    source = await make_ready(tmp_path)
    await crash_in_deletion(tmp_path, 1)
    await crash_in_validation(tmp_path, source)
    async with library(tmp_path) as at:
        await at.catalog.resume()
        await at.until(2, VersionState.READY)
        await at.until(1, VersionState.DELETED)
        await at.catalog.unload(key(2))
        await at.catalog.load(key(2))


async def test_a_validation_whose_source_is_broken_by_now_fails(tmp_path: Path) -> None:
    async with library(tmp_path) as at:
        source = at.source("one", configure(r=4))
    await crash_in_validation(tmp_path, source)
    async with library(tmp_path) as at:
        await at.catalog.resume()
        with pytest.raises(AdapterInvalid, match="other shapes"):
            await at.catalog.settled(await at.registry.version(*key(1)))


async def test_a_validation_whose_source_is_not_allowed_any_more_fails(tmp_path: Path) -> None:
    await crash_in_validation(tmp_path, str(tmp_path / "elsewhere"))
    async with library(tmp_path) as at:
        await at.catalog.resume()
        record = await at.until(1, VersionState.FAILED)
        (finding,) = record.findings
        assert "--adapter-source-allow" in finding


async def test_a_deletion_goes_on(tmp_path: Path) -> None:
    await make_ready(tmp_path, count=2)
    await crash_in_deletion(tmp_path, 1)
    async with library(tmp_path) as at:
        await at.catalog.resume()
        await at.until(1, VersionState.DELETED)
        assert len(at.digests) == 1, "its twin has them"
    await crash_in_deletion(tmp_path, 2)
    async with library(tmp_path) as at:
        await at.catalog.resume()
        await at.until(2, VersionState.DELETED)
        await happens(lambda: not at.digests)
        await at.catalog.resume()  # nothing is left to be done
        kinds = [event.kind for event in await at.registry.events(TENANT, after=0, limit=100)]
        assert kinds.count(EventKind.VERSION_DELETED) == 2


async def test_who_deletes_again_joins_the_deletion_that_goes_on(tmp_path: Path) -> None:
    await make_ready(tmp_path)
    await crash_in_deletion(tmp_path, 1)
    async with library(tmp_path) as at:
        await at.catalog.resume()
        assert (await at.delete(1)).state is VersionState.DELETED
        assert not at.digests


async def test_files_that_a_crash_left_to_no_version_are_swept(tmp_path: Path) -> None:
    source = await make_ready(tmp_path)
    async with library(tmp_path) as at:
        with at.store.stage(Path(at.source("two"))) as staged:
            orphan = staged.commit().digest  # and here it was cut off
        assert len(at.digests) == 2
        await at.catalog.resume()
        assert orphan not in at.digests and len(at.digests) == 1
        await at.catalog.load(key(1))
        await at.make_ready(source)


async def test_an_orderly_end_leaves_a_validation_to_the_next_start(tmp_path: Path) -> None:
    async with library(tmp_path) as at:
        at.probe.may_answer.clear()
        await at.create(at.source("one"))
        await happens(lambda: at.probe.probed)
    async with library(tmp_path) as at:
        assert await at.state(1) is VersionState.VALIDATING
        assert not at.staged
        await at.catalog.resume()
        await at.until(1, VersionState.READY)


async def test_an_orderly_end_leaves_a_deletion_to_the_next_start(tmp_path: Path) -> None:
    async with library(tmp_path) as at:
        await at.make_ready(at.source("one"))
        await at.take_traffic_away()
        async with at.pool.route(TENANT, "sql", 1, "").lease():
            deletion = asyncio.create_task(at.delete(1))
            await at.until(1, VersionState.DRAINING)
            await at.catalog.close()
        await asyncio.gather(deletion, return_exceptions=True)
        assert len(at.digests) == 1
    async with library(tmp_path) as at:
        await at.catalog.resume()
        await at.until(1, VersionState.DELETED)


async def test_what_a_shard_left_undone_is_said_and_goes_on_at_the_next_start(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with library(tmp_path) as at:
        at.core.dead = True
        with caplog.at_level(logging.ERROR):
            await at.create(at.source("one"))
            await happens(lambda: "left for later" in caplog.text)
        assert await at.state(1) is VersionState.VALIDATING
    async with library(tmp_path) as at:
        await at.catalog.resume()
        await at.until(1, VersionState.READY)


def spoil(at: Library) -> None:
    """Other bytes where the only artifact was."""
    (digest,) = at.digests
    weights = at.root / "state" / "adapters" / digest / WEIGHTS_FILE
    weights.chmod(0o600)
    weights.write_bytes(b"other bytes")


async def test_a_twin_of_damaged_files_fails_and_says_so(tmp_path: Path) -> None:
    source = await make_ready(tmp_path)
    async with library(tmp_path) as at:
        spoil(at)
        with pytest.raises(AdapterInvalid, match="were changed after they were stored"):
            await at.make_ready(source)
        assert await at.state(1) is VersionState.READY
