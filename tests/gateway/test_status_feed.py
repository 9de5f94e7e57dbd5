"""The state goes to all who look, at their own pace, and is read only for them."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, AsyncIterator

import pytest

from gateway.admission import Draining, Overloaded
from gateway.status import Status
from gateway.status_feed import StatusFeed
from tests.gateway.statuses import status

TIMEOUT_S = 10.0


class Source:
    """A gateway whose model is called as a test says."""

    def __init__(self) -> None:
        self.model = "first"
        self.reads = 0
        self.fails = False
        self._read = asyncio.Event()

    async def read(self) -> Status:
        self.reads += 1
        event, self._read = self._read, asyncio.Event()
        event.set()
        if self.fails:
            raise OSError("the disk is gone")
        return status(model=self.model)

    async def wait_reads(self, count: int) -> None:
        """Wait until it was read so many times more."""
        for _ in range(count):
            await asyncio.wait_for(self._read.wait(), TIMEOUT_S)


def feed_of(source: Source, *, heartbeat_s: float = 60.0, max_viewers: int = 2) -> StatusFeed:
    return StatusFeed(
        source.read, interval_s=0.01, heartbeat_s=heartbeat_s, max_viewers=max_viewers
    )


@contextlib.asynccontextmanager
async def viewer(feed: StatusFeed) -> AsyncIterator[AsyncGenerator[bytes | None, None]]:
    with feed.seat():
        async with contextlib.aclosing(feed.follow()) as snapshots:
            yield snapshots


async def model_of(snapshots: AsyncGenerator[bytes | None, None]) -> str:
    async with asyncio.timeout(TIMEOUT_S):
        snapshot = await anext(snapshots)
    assert snapshot is not None and b"\n" not in snapshot
    return str(json.loads(snapshot)["model"])


async def test_a_viewer_is_told_the_state_and_each_change_of_it() -> None:
    source = Source()
    feed = feed_of(source)
    async with viewer(feed) as snapshots:
        assert await model_of(snapshots) == "first"
        waiting = asyncio.ensure_future(model_of(snapshots))
        await source.wait_reads(3)
        assert not waiting.done(), "nothing has changed"
        source.model = "second"
        assert await waiting == "second"
    await feed.close()


async def test_a_slow_viewer_gets_the_latest_state_and_none_in_between() -> None:
    source = Source()
    feed = feed_of(source)
    async with viewer(feed) as slow, viewer(feed) as quick:
        assert await model_of(slow) == await model_of(quick) == "first"
        for model in ("second", "third", "fourth"):
            source.model = model
            assert await model_of(quick) == model
        assert await model_of(slow) == "fourth"
    await feed.close()


async def test_a_heartbeat_comes_where_nothing_changes() -> None:
    feed = feed_of(Source(), heartbeat_s=0.05)
    async with viewer(feed) as snapshots:
        async with asyncio.timeout(TIMEOUT_S):
            told = [await anext(snapshots) for _ in range(8)]
        assert sum(snapshot is not None for snapshot in told) == 1
    await feed.close()


async def test_nothing_is_read_while_nobody_looks_and_nothing_old_is_told() -> None:
    source = Source()
    feed = feed_of(source)
    async with viewer(feed) as first, viewer(feed) as second:
        assert await model_of(first) == await model_of(second) == "first"
    reads = source.reads
    source.model = "second"
    await asyncio.sleep(0.1)  # ten times as long as between two reads
    assert source.reads == reads
    async with viewer(feed) as snapshots:
        assert await model_of(snapshots) == "second"
    await feed.close()


async def test_one_that_leaves_does_not_end_the_reads_for_the_others() -> None:
    source = Source()
    feed = feed_of(source)
    async with viewer(feed) as stays:
        assert await model_of(stays) == "first"
        async with viewer(feed) as leaves:
            assert await model_of(leaves) == "first"
        source.model = "second"
        assert await model_of(stays) == "second"
    await feed.close()


async def test_one_too_many_is_refused_until_another_leaves() -> None:
    feed = feed_of(Source(), max_viewers=1)
    refusal = pytest.raises(Overloaded, match="1 viewers of the status page")
    with feed.seat(), refusal, feed.seat():
        pass
    with feed.seat():
        pass
    await feed.close()


async def test_a_read_that_fails_is_logged_once_and_tried_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    source = Source()
    source.fails = True
    feed = feed_of(source)
    async with viewer(feed) as snapshots:
        waiting = asyncio.ensure_future(model_of(snapshots))
        await source.wait_reads(3)
        assert len(caplog.records) == 1 and "the disk is gone" in caplog.text
        source.fails = False
        assert await waiting == "first"
    await feed.close()


async def test_the_end_ends_what_all_follow_and_refuses_who_comes() -> None:
    source = Source()
    feed = feed_of(source)
    async with viewer(feed) as snapshots:
        assert await model_of(snapshots) == "first"
        ended = asyncio.ensure_future(anext(snapshots, "the end"))
        await asyncio.sleep(0)
        await feed.close()
        async with asyncio.timeout(TIMEOUT_S):
            assert await ended == "the end"
        reads = source.reads
        with pytest.raises(Draining), feed.seat():
            pass
        await asyncio.sleep(0.1)
        assert source.reads == reads
    await feed.close()
