"""Watching adapters: each event once and in order, whatever happens to the connection."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator

import grpc
import grpc.aio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_gateway import (
    AdapterEvent,
    AdapterWatch,
    ErrorReason,
    EventKind,
    GatewayClient,
    GatewayError,
    IncompleteStream,
    Unavailable,
)
from lora_gateway.v1 import adapters_pb2 as pb
from lora_gateway.v1.adapters_pb2_grpc import AdaptersStub
from tests.client.fake_adapters import UNAVAILABLE, Context, FakeAdapters, refusal, served

SOON_S = 10.0
"""For what happens at once; a test that needs it all has failed."""


class ForgetfulAdapters(FakeAdapters):
    """Replays every event to whoever watches, whatever they have seen."""

    async def WatchAdapters(
        self, request: pb.WatchAdaptersRequest, context: Context
    ) -> AsyncIterator[pb.WatchAdaptersResponse]:
        everything = pb.WatchAdaptersRequest(after_sequence=0)
        async for response in super().WatchAdapters(everything, context):
            yield response


@pytest.fixture
def adapters() -> FakeAdapters:
    return FakeAdapters()


@pytest.fixture
async def client(adapters: FakeAdapters) -> AsyncIterator[GatewayClient]:
    async with served(adapters) as target, GatewayClient(target) as client:
        yield client


async def sequences(watch: AdapterWatch, count: int) -> list[int]:
    """Sequence numbers of the next events, which must come soon."""
    return [event.sequence for event in await following(watch, count)]


async def following(watch: AdapterWatch, count: int) -> list[AdapterEvent]:
    return [await asyncio.wait_for(anext(watch), SOON_S) for _ in range(count)]


async def begun(watch: AdapterWatch) -> asyncio.Task[AdapterEvent]:
    """Waits for the next event, in a watch of new ones that has begun by now."""
    waiting = asyncio.ensure_future(anext(watch))
    async with asyncio.timeout(SOON_S):
        while watch.sequence is None:
            await asyncio.sleep(0)
    return waiting


def asked_after(adapters: FakeAdapters) -> list[int | None]:
    """The `after_sequence` of each attempt."""
    return [
        request.after_sequence if request.HasField("after_sequence") else None
        for request in adapters.requests
        if isinstance(request, pb.WatchAdaptersRequest)
    ]


async def test_a_watch_replays_and_then_follows(
    client: GatewayClient, adapters: FakeAdapters
) -> None:
    for _ in range(3):
        await adapters.add("pirate")
    async with client.adapters.watch(after_sequence=1) as watch:
        assert await sequences(watch, 2) == [2, 3]
        await adapters.add("pirate")
        (event,) = await following(watch, 1)
    assert (event.sequence, event.version) == (4, 4)
    assert event.kind == EventKind.EVENT_KIND_VERSION_READY


async def test_a_watch_of_new_events_shows_no_old_ones(
    client: GatewayClient, adapters: FakeAdapters
) -> None:
    await adapters.add("pirate")
    async with client.adapters.watch() as watch:
        waiting = await begun(watch)
        assert watch.sequence == 1
        await adapters.add("pirate")
        assert (await asyncio.wait_for(waiting, SOON_S)).sequence == 2
        assert watch.sequence == 2


async def test_a_watch_of_one_adapter_shows_that_one(
    client: GatewayClient, adapters: FakeAdapters
) -> None:
    for name in ("pirate", "support", "pirate"):
        await adapters.add(name)
    async with client.adapters.watch(after_sequence=0, adapter="pirate") as watch:
        assert await sequences(watch, 2) == [1, 3]


# --- connections that break


@settings(max_examples=10, deadline=None)
@given(cuts=st.lists(st.integers(0, 3), max_size=3), forgetful=st.booleans())
def test_each_event_comes_once_and_in_order_however_often_it_breaks(
    cuts: list[int], forgetful: bool
) -> None:
    async def watched() -> list[int]:
        adapters = ForgetfulAdapters() if forgetful else FakeAdapters()
        for _ in range(6):
            await adapters.add("pirate")
        adapters.watch_cuts.extend((count, UNAVAILABLE) for count in cuts)
        async with (
            served(adapters) as target,
            GatewayClient(target) as client,
            client.adapters.watch(after_sequence=0) as watch,
        ):
            return await sequences(watch, 6)

    assert asyncio.run(watched()) == [1, 2, 3, 4, 5, 6]


async def test_what_happened_while_the_gateway_was_gone_is_told_afterwards(
    client: GatewayClient, adapters: FakeAdapters
) -> None:
    for _ in range(5):
        await adapters.add("pirate")
    adapters.watch_cuts.append((0, UNAVAILABLE))
    async with client.adapters.watch() as watch:
        waiting = await begun(watch)
        await adapters.add("pirate")
        assert (await asyncio.wait_for(waiting, SOON_S)).sequence == 6
    assert asked_after(adapters) == [None, 5]


async def test_a_watch_that_ends_in_order_is_called_again(
    client: GatewayClient, adapters: FakeAdapters
) -> None:
    await adapters.add("pirate")
    await adapters.add("pirate")
    adapters.watch_cuts.append((1, None))
    async with client.adapters.watch(after_sequence=0) as watch:
        assert await sequences(watch, 2) == [1, 2]
    assert asked_after(adapters) == [0, 1]


async def test_a_gateway_that_says_nothing_is_lost(adapters: FakeAdapters) -> None:
    await adapters.add("pirate")
    adapters.watch_cuts.append((1, UNAVAILABLE))
    async with served(adapters) as target, grpc.aio.insecure_channel(target) as channel:
        stub = AdaptersStub(channel)
        watch = AdapterWatch(
            lambda request: stub.WatchAdapters(request),
            after_sequence=0,
            adapter="",
            reconnect=True,
            silence_limit_s=0.2,
        )
        async with watch:
            assert await sequences(watch, 1) == [1]
            adapters.silent_watches = 1
            await adapters.add("pirate")
            assert await sequences(watch, 1) == [2]
    assert asked_after(adapters)[:3] == [0, 1, 1]


async def test_a_gateway_that_is_not_there_to_begin_with_is_unavailable(
    client: GatewayClient, adapters: FakeAdapters
) -> None:
    adapters.failures.extend([UNAVAILABLE] * 5)
    with pytest.raises(Unavailable):
        await asyncio.wait_for(anext(client.adapters.watch(after_sequence=0)), SOON_S)
    assert len(adapters.requests) == 4


@pytest.mark.parametrize(
    ("cut", "kind"), [(UNAVAILABLE, Unavailable), (None, IncompleteStream)], ids=["status", "end"]
)
async def test_without_reconnect_the_end_is_raised(
    client: GatewayClient, adapters: FakeAdapters, cut: None, kind: type[GatewayError]
) -> None:
    await adapters.add("pirate")
    adapters.watch_cuts.append((1, cut))
    async with client.adapters.watch(after_sequence=0, reconnect=False) as watch:
        assert await sequences(watch, 1) == [1]
        with pytest.raises(kind):
            await asyncio.wait_for(anext(watch), SOON_S)
    assert len(adapters.requests) == 1


async def test_a_sequence_of_another_state_folder_is_raised(
    client: GatewayClient, adapters: FakeAdapters
) -> None:
    await adapters.add("pirate")
    text = "the newest event is 0"
    adapters.watch_cuts.append((1, refusal(grpc.StatusCode.OUT_OF_RANGE, "SEQUENCE_UNKNOWN", text)))
    async with client.adapters.watch(after_sequence=0) as watch:
        await following(watch, 1)
        with pytest.raises(GatewayError, match=text) as raised:
            await asyncio.wait_for(anext(watch), SOON_S)
    assert raised.value.reason == ErrorReason.ERROR_REASON_SEQUENCE_UNKNOWN


# --- readers that leave


async def test_a_reader_that_stops_waiting_loses_nothing(
    client: GatewayClient, adapters: FakeAdapters
) -> None:
    async with client.adapters.watch() as watch:
        waiting = await begun(watch)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        await adapters.add("pirate")
        await adapters.add("pirate")
        assert await sequences(watch, 2) == [1, 2]


async def test_leaving_the_block_ends_the_watch_at_the_server(
    client: GatewayClient, adapters: FakeAdapters
) -> None:
    await adapters.add("pirate")
    async with client.adapters.watch(after_sequence=0) as watch:
        await following(watch, 1)
    await asyncio.wait_for(adapters.cancelled.wait(), SOON_S)
    assert [event async for event in watch] == []


async def test_breaking_out_of_a_bare_loop_ends_the_watch_at_the_server(
    client: GatewayClient, adapters: FakeAdapters
) -> None:
    await adapters.add("pirate")
    gc.disable()  # dropping the last reference must be enough
    try:
        async for _ in client.adapters.watch(after_sequence=0):
            break
        await asyncio.wait_for(adapters.cancelled.wait(), SOON_S)
    finally:
        gc.enable()


async def test_a_watch_has_no_deadline(client: GatewayClient, adapters: FakeAdapters) -> None:
    await adapters.add("pirate")
    async with client.adapters.watch(after_sequence=0) as watch:
        await following(watch, 1)
    assert adapters.time_remaining_s is None
