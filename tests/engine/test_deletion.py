"""A version leaves the engines with its last request, and its files leave with its last twin."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from engine.errors import AdapterInvalid, AdapterLoadFailed, VersionNotFound
from store.records import (
    TransitionRefused,
    VersionInUse,
    VersionState,
    VersionUnknown,
)
from tests.engine.library import TENANT, Library, happens, key, library


@pytest.fixture
async def at(tmp_path: Path) -> AsyncIterator[Library]:
    async with library(tmp_path) as at:
        yield at


async def test_a_deleted_version_is_out_of_the_engine_and_the_store(at: Library) -> None:
    await at.make_ready(at.source("one"))
    with pytest.raises(VersionInUse):
        await at.delete(1)
    assert at.core.keys == {key(1)} and len(at.digests) == 1
    await at.take_traffic_away()
    assert (await at.delete(1)).state is VersionState.DELETED
    assert at.core.keys == set() and not at.digests
    assert (await at.delete(1)).state is VersionState.DELETED, "again is no error"
    with pytest.raises(VersionUnknown):
        await at.delete(2)


async def test_it_waits_for_its_last_request_and_takes_no_more(at: Library) -> None:
    await at.make_ready(at.source("one"))
    await at.take_traffic_away()
    route = at.pool.route(TENANT, "sql", 1, "")
    async with route.lease():
        deletions = [asyncio.create_task(at.delete(1)) for _ in range(2)]
        await happens(lambda: not at.residents.uses())  # it is handed out no more
        assert await at.state(1) is VersionState.DRAINING
        with pytest.raises(VersionNotFound):
            at.pool.route(TENANT, "sql", 1, "")
        late = asyncio.create_task(at.catalog.load(key(1)))
        await asyncio.sleep(0.02)
        assert not any(deletion.done() for deletion in deletions)
        assert at.core.keys == {key(1)} and len(at.digests) == 1
    for record in await asyncio.gather(*deletions):
        assert record.state is VersionState.DELETED
    with pytest.raises(AdapterLoadFailed):
        await late
    with pytest.raises(AdapterLoadFailed, match="it is D"):
        async with route.lease():
            pass
    assert at.core.keys == set() and not at.digests


async def test_a_cancelled_caller_does_not_stop_it(at: Library) -> None:
    source = at.source("one")
    for version in range(1, 9):
        await at.make_ready(source)
        await at.take_traffic_away()
        deletion = asyncio.create_task(at.delete(version))
        for _ in range(version):
            await asyncio.sleep(0)  # so that it is cut off at another step each time
        deletion.cancel()
        await asyncio.gather(deletion, return_exceptions=True)
        await at.until(version, VersionState.DELETED)
    await happens(lambda: not at.digests)


async def test_a_failed_version_has_nothing_left_to_be_taken_away(at: Library) -> None:
    at.probe.says[key(1)] = ["it answers in NaN"]
    with pytest.raises(AdapterInvalid):
        await at.make_ready(at.source("one"))
    assert (await at.delete(1)).state is VersionState.DELETED


async def test_what_is_being_validated_cannot_be_deleted(at: Library) -> None:
    at.probe.may_answer.clear()
    record = await at.create(at.source("one"))
    with pytest.raises(TransitionRefused):
        await at.delete(1)
    at.probe.may_answer.set()
    assert (await at.catalog.settled(record)).state is VersionState.READY


async def test_equal_files_stay_until_the_last_version_goes(at: Library) -> None:
    source = at.source("one")
    first, second = await at.make_ready(source), await at.make_ready(source)
    assert first.content == second.content and len(at.digests) == 1
    await at.take_traffic_away()
    await at.delete(1)
    assert len(at.digests) == 1
    await at.catalog.load(key(2))
    await at.delete(2)
    assert not at.digests


async def test_a_twin_that_fails_takes_no_files_away(at: Library) -> None:
    source = at.source("one")
    await at.make_ready(source)
    at.probe.says[key(2)] = ["it answers in NaN"]
    with pytest.raises(AdapterInvalid):
        await at.make_ready(source)
    assert len(at.digests) == 1
    await at.catalog.unload(key(1))
    await at.catalog.load(key(1))


async def test_files_stay_for_a_twin_that_is_being_validated(at: Library) -> None:
    source = at.source("one")
    await at.make_ready(source)
    await at.take_traffic_away()
    at.probe.may_answer.clear()
    twin = await at.create(source)
    await happens(lambda: len(at.probe.probed) == 2)
    await at.delete(1)
    assert len(at.digests) == 1
    at.probe.may_answer.set()
    await at.catalog.settled(twin)
    await at.catalog.unload(key(2))
    await at.catalog.load(key(2))


async def test_of_twins_that_are_validated_at_once_each_gets_its_own_verdict(at: Library) -> None:
    source = at.source("one")
    at.probe.may_answer.clear()
    twins = [await at.create(source) for _ in range(2)]
    await happens(lambda: len(at.probe.probed) == 2)
    at.probe.says[key(1)] = ["it answers in NaN"]
    at.probe.may_answer.set()
    with pytest.raises(AdapterInvalid):
        await at.catalog.settled(twins[0])
    assert (await at.catalog.settled(twins[1])).state is VersionState.READY
    assert len(at.digests) == 1 and at.core.keys == {key(2)}
