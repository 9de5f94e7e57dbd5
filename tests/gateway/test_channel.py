"""The pipe between host and worker: whole messages in order, whatever their size, never waiting."""

from __future__ import annotations

import asyncio
import multiprocessing
import multiprocessing.resource_sharer
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from multiprocessing.connection import Connection
from typing import Any

import pytest
import pytest_asyncio

from engine.generation import VersionKey
from engine.quarantine import Quarantined
from engine.residents import Use
from engine.ring import AdapterKey, Plan
from gateway.channel import Channel
from gateway.messages import (
    Acquitted,
    Answer,
    Ask,
    Ended,
    Flush,
    FollowPlan,
    FollowQuarantine,
    ShardDied,
    SlotGranted,
    Used,
    WaitsForSlot,
    Want,
    WentIdle,
)
from tests.gateway.outcomes import outcome

TIMEOUT_S = 30.0
HELD = Quarantined({7: 1.5}, {"acme/alpha@1": 2.5}, frozenset({8}))
LARGE_BYTES = 16 * 1024**2
"""Many times what a pipe holds."""

ECHO = """
import os, sys
descriptor = int(sys.argv[1])
while data := os.read(descriptor, 65536):
    while data:
        data = data[os.write(descriptor, data):]
"""
"""A peer that gives back what it gets, and blocks like one that is busy."""

AnyChannel = Channel[Any, Any]


@pytest_asyncio.fixture
async def ends() -> AsyncIterator[tuple[AnyChannel, AnyChannel]]:
    """Both ends of one pipe, in this process."""
    ours, theirs = multiprocessing.Pipe()
    channels: tuple[AnyChannel, AnyChannel] = Channel(ours), Channel(theirs)
    yield channels
    for channel in channels:
        channel.close()


@pytest.fixture
def peer() -> Iterator[tuple[Connection, subprocess.Popen[bytes]]]:
    """Our end of a pipe, and the process that echoes at the other."""
    ours, theirs = multiprocessing.Pipe()
    command = [sys.executable, "-S", "-E", "-c", ECHO, str(theirs.fileno())]
    with subprocess.Popen(command, pass_fds=[theirs.fileno()]) as process:
        theirs.close()
        yield ours, process
        process.kill()


async def received(channel: AnyChannel) -> Any:
    async with asyncio.timeout(TIMEOUT_S):
        return await channel.receive()


def large(byte: bytes = b"x") -> Answer:
    return Answer(1, byte * LARGE_BYTES)


async def test_messages_arrive_whole_and_in_order(ends: tuple[AnyChannel, AnyChannel]) -> None:
    host, worker = ends
    sent = [
        Ask(1, Flush()),
        Ask(3, FollowPlan(Plan(((AdapterKey("default", "alpha"), 2),), 1))),
        ShardDied("shard-0", True, HELD),
        Ask(4, FollowQuarantine(HELD)),
        Acquitted(2**64 - 1),
        Want("shard-0", VersionKey("default", "alpha", 3)),
        WaitsForSlot("shard-0", VersionKey("default", "alpha", 3), 71, True),
        WentIdle("shard-0"),
        SlotGranted("shard-0", VersionKey("default", "alpha", 3)),
        Used({AdapterKey("default", "alpha"): 3, None: 4}),
        Answer(2, {VersionKey("default", "alpha", 3): Use(1, 2.0)}),
        Ended([outcome(request_id=f"r-{number}") for number in range(256)]),
    ]
    for message in sent:
        host.send(message)
    assert [await received(worker) for _ in sent] == sent


async def test_thousands_of_small_messages_arrive_in_order(
    ends: tuple[AnyChannel, AnyChannel],
) -> None:
    host, worker = ends
    for number in range(5_000):
        host.send(Answer(number))
    assert [(await received(worker)).ticket for _ in range(5_000)] == list(range(5_000))


async def test_large_messages_both_ways_at_once_block_neither_side(
    ends: tuple[AnyChannel, AnyChannel],
) -> None:
    """A send that waits would wait for ever: nothing is read before all are made."""
    host, worker = ends
    for _ in range(2):
        host.send(large(b"h"))
        worker.send(large(b"w"))
    host.send(Answer(7))
    for _ in range(2):
        assert await received(worker) == large(b"h")
        assert await received(host) == large(b"w")
    assert await received(worker) == Answer(7)


async def test_a_peer_that_is_stopped_holds_up_nobody_and_gets_all_later(
    peer: tuple[Connection, subprocess.Popen[bytes]],
) -> None:
    connection, process = peer
    channel: AnyChannel = Channel(connection)
    channel.send(Answer(1))
    assert await received(channel) == Answer(1), "it runs"
    process.send_signal(signal.SIGSTOP)
    await asyncio.to_thread(os.waitid, os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
    for number in range(4):
        channel.send(large())
        channel.send(Answer(number))
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(channel.receive(), 0.1)
    process.send_signal(signal.SIGCONT)
    for number in range(4):
        assert await received(channel) == large()
        assert await received(channel) == Answer(number)
    channel.close()


async def test_a_peer_that_dies_ends_the_channel(
    peer: tuple[Connection, subprocess.Popen[bytes]],
) -> None:
    connection, process = peer
    channel: AnyChannel = Channel(connection)
    channel.send(large())  # it is killed with half of it
    process.kill()
    while (message := await received(channel)) is not None:
        assert message == large()
    channel.send(large())  # silent: its end is seen elsewhere
    channel.close()


async def test_what_was_sent_before_the_end_is_received_before_it(
    ends: tuple[AnyChannel, AnyChannel],
) -> None:
    host, worker = ends
    worker.send(Answer(1))
    worker.send(Answer(2))
    worker.close()
    worker.close()  # safe to call twice
    assert [await received(host) for _ in range(3)] == [Answer(1), Answer(2), None]
    host.send(Answer(3))
    worker.send(Answer(4))


async def test_a_message_that_is_cut_off_by_the_end_is_none() -> None:
    raw, ours = multiprocessing.Pipe()
    channel: AnyChannel = Channel(ours)
    os.write(raw.fileno(), (100).to_bytes(4, "big") + b"half")
    raw.close()
    assert await received(channel) is None


async def test_sockets_travel_in_messages(ends: tuple[AnyChannel, AnyChannel]) -> None:
    """As the listeners of a client slot do."""
    host, worker = ends
    with socket.create_server(("127.0.0.1", 0)) as listener:
        host.send(Answer(1, listener))
        arrived = (await received(worker)).value
    try:
        with socket.create_connection(arrived.getsockname()) as caller:
            accepted, address = arrived.accept()
            accepted.close()
            assert address == caller.getsockname(), "the copy outlives the original"
    finally:
        arrived.close()
        multiprocessing.resource_sharer.stop()
