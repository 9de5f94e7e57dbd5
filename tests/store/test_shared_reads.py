"""What many ask for at once is read once, and nobody's leaving is another's loss."""

from __future__ import annotations

import asyncio

import pytest

from store.shared_reads import SharedReads


class Source:
    """Is read when a test says so."""

    def __init__(self) -> None:
        self.reads = 0
        self.go = asyncio.Event()
        self.error: Exception | None = None

    async def read(self) -> int:
        self.reads += 1
        number = self.reads
        await self.go.wait()
        if self.error is not None:
            raise self.error
        return number


async def test_those_who_ask_for_the_same_meanwhile_share_a_read() -> None:
    reads, source = SharedReads(), Source()
    asking = [asyncio.create_task(reads.read("a", source.read)) for _ in range(100)]
    other = asyncio.create_task(reads.read("b", source.read))
    await asyncio.sleep(0)
    source.go.set()
    assert await asyncio.gather(*asking) == [1] * 100
    assert await other == 2
    assert await reads.read("a", source.read) == 3, "nothing is remembered"


async def test_one_who_leaves_does_not_end_the_read_of_others() -> None:
    reads, source = SharedReads(), Source()
    first, second = (asyncio.create_task(reads.read("a", source.read)) for _ in range(2))
    await asyncio.sleep(0)
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    source.go.set()
    assert await second == 1


async def test_a_read_that_fails_fails_for_all_and_is_tried_again_by_the_next() -> None:
    reads, source = SharedReads(), Source()
    source.error = OSError("gone")
    asking = [asyncio.create_task(reads.read("a", source.read)) for _ in range(2)]
    await asyncio.sleep(0)
    source.go.set()
    for each in asking:
        with pytest.raises(OSError, match="gone"):
            await each
    source.error = None
    assert await reads.read("a", source.read) == 2
