"""Watching a job and its log: everything once and in order, whatever happens to the connection."""

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
    ErrorReason,
    GatewayClient,
    GatewayError,
    IncompleteStream,
    JobEvent,
    JobState,
    JobWatch,
    NotFound,
    Unavailable,
)
from lora_gateway.v1 import training_pb2 as pb
from lora_gateway.v1.training_pb2_grpc import TrainingStub
from tests.client.fake_adapters import UNAVAILABLE, refusal
from tests.client.fake_training import FakeTraining, progress, served, states

SOON_S = 10.0
"""For what happens at once; a test that needs it all has failed."""

STEPS = [progress(step, 5, 1 / step) for step in range(1, 6)]
"""With VALIDATING before and SUCCEEDED after: seven events."""


@pytest.fixture
def training() -> FakeTraining:
    return FakeTraining()


@pytest.fixture
async def client(training: FakeTraining) -> AsyncIterator[GatewayClient]:
    async with served(training) as target, GatewayClient(target) as client:
        yield client


async def ran(training: FakeTraining, name: str = "run") -> None:
    """A job that has ended, with seven events."""
    await training.add_job(name)
    await training.tell(name, *STEPS, *states("SUCCEEDED"))


async def whole(watch: JobWatch) -> list[int]:
    """Sequences of all events to the end, which must come soon."""
    async with asyncio.timeout(SOON_S), watch:
        return [event.sequence async for event in watch]


async def following(watch: JobWatch, count: int) -> list[JobEvent]:
    return [await asyncio.wait_for(anext(watch), SOON_S) for _ in range(count)]


def asked_after(training: FakeTraining) -> list[int]:
    """The `after_sequence` of each attempt."""
    requests = training.requests
    return [asked.after_sequence for asked in requests if isinstance(asked, pb.WatchJobRequest)]


async def test_a_watch_replays_follows_and_ends_with_the_job(
    client: GatewayClient, training: FakeTraining
) -> None:
    await training.add_job("run")
    await training.tell("run", STEPS[0])
    async with client.training.watch_job("run") as watch:
        assert watch.state is None
        first, second = await following(watch, 2)
        assert (first.sequence, first.state_changed.state) == (1, JobState.JOB_STATE_VALIDATING)
        assert (second.sequence, second.progress.loss) == (2, 1.0)
        waiting = asyncio.ensure_future(anext(watch))
        await training.tell("run", *states("SUCCEEDED"))
        assert (await asyncio.wait_for(waiting, SOON_S)).sequence == 3
        with pytest.raises(StopAsyncIteration):
            await asyncio.wait_for(anext(watch), SOON_S)
        assert watch.sequence == 3
        assert watch.state == JobState.JOB_STATE_SUCCEEDED
    assert training.requests == [pb.WatchJobRequest(name="run")]


async def test_a_watch_goes_on_behind_what_was_seen(
    client: GatewayClient, training: FakeTraining
) -> None:
    await ran(training)
    assert await whole(client.training.watch_job("run", after_sequence=5)) == [6, 7]


async def test_a_watch_behind_the_last_event_of_a_job_that_ended_is_empty(
    client: GatewayClient, training: FakeTraining
) -> None:
    await ran(training)
    watch = client.training.watch_job("run", after_sequence=7)
    assert await whole(watch) == []
    assert watch.state == JobState.JOB_STATE_SUCCEEDED
    assert asked_after(training) == [7]


async def test_a_heartbeat_tells_the_state(client: GatewayClient, training: FakeTraining) -> None:
    await training.add_job("run")
    await training.tell("run", *states("RUNNING"))
    async with client.training.watch_job("run", after_sequence=2) as watch:
        waiting = asyncio.ensure_future(anext(watch))
        async with asyncio.timeout(SOON_S):
            while watch.state is None:
                await asyncio.sleep(0)
        assert watch.state == JobState.JOB_STATE_RUNNING
        waiting.cancel()


# --- connections that break


@settings(max_examples=10, deadline=None)
@given(
    first=st.integers(1, 3),
    cuts=st.lists(st.tuples(st.integers(0, 3), st.sampled_from([UNAVAILABLE, None])), max_size=4),
    forgetful=st.booleans(),
)
def test_each_event_comes_once_and_in_order_however_often_it_breaks(
    first: int, cuts: list[tuple[int, None]], forgetful: bool
) -> None:
    async def watched() -> list[int]:
        training = FakeTraining()
        training.forgetful = forgetful
        await ran(training)
        # A first call that tells nothing at all would be a gateway that is not there.
        training.watch_cuts.extend([(first, UNAVAILABLE), *cuts])
        async with served(training) as target, GatewayClient(target) as client:
            return await whole(client.training.watch_job("run"))

    assert asyncio.run(watched()) == [1, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize("told", [0, 3])
async def test_a_watch_that_ends_before_the_job_does_is_called_again(
    client: GatewayClient, training: FakeTraining, told: int
) -> None:
    await ran(training)
    training.watch_cuts.append((told, None))
    assert await whole(client.training.watch_job("run")) == [1, 2, 3, 4, 5, 6, 7]
    assert asked_after(training) == [0, told]


async def test_what_happened_while_the_gateway_was_gone_is_told_afterwards(
    client: GatewayClient, training: FakeTraining
) -> None:
    await training.add_job("run")
    training.watch_cuts.append((1, UNAVAILABLE))
    async with client.training.watch_job("run") as watch:
        await following(watch, 1)
        training.failures.extend([UNAVAILABLE] * 6)
        await training.tell("run", *STEPS, *states("SUCCEEDED"))
        assert await whole(watch) == [2, 3, 4, 5, 6, 7]


async def test_an_event_that_is_missing_is_raised_and_ends_the_watch(
    client: GatewayClient, training: FakeTraining
) -> None:
    await ran(training)
    training.lost = {3, 4}
    async with client.training.watch_job("run") as watch:
        assert [event.sequence for event in await following(watch, 2)] == [1, 2]
        with pytest.raises(IncompleteStream, match=r"events 3 to 4 of job 'run' are missing"):
            await asyncio.wait_for(anext(watch), SOON_S)
        assert watch.sequence == 2
        assert await whole(watch) == []


async def test_a_heartbeat_ahead_of_the_events_is_a_gap_too(
    client: GatewayClient, training: FakeTraining
) -> None:
    await training.add_job("run")
    await training.tell("run", STEPS[0])
    training.lost = {2}
    async with client.training.watch_job("run") as watch:
        await following(watch, 1)
        with pytest.raises(IncompleteStream, match="events 2 to 2"):
            await asyncio.wait_for(anext(watch), SOON_S)


async def test_a_gateway_that_says_nothing_is_lost(training: FakeTraining) -> None:
    await ran(training)
    training.watch_cuts.append((1, UNAVAILABLE))

    async def get_job() -> pb.Job:
        return training.jobs["run"]

    async with served(training) as target, grpc.aio.insecure_channel(target) as channel:
        stub = TrainingStub(channel)
        watch = JobWatch(
            lambda request: stub.WatchJob(request),
            get_job,
            "run",
            after_sequence=0,
            reconnect=True,
            silence_limit_s=0.2,
        )
        await following(watch, 1)
        training.silent_watches = 1
        assert await whole(watch) == [2, 3, 4, 5, 6, 7]
    assert asked_after(training) == [0, 1, 1]


async def test_a_gateway_that_is_not_there_to_begin_with_is_unavailable(
    client: GatewayClient, training: FakeTraining
) -> None:
    training.failures.extend([UNAVAILABLE] * 5)
    with pytest.raises(Unavailable):
        await asyncio.wait_for(anext(client.training.watch_job("run")), SOON_S)
    assert len(training.requests) == 4


@pytest.mark.parametrize(
    ("cut", "kind"), [(UNAVAILABLE, Unavailable), (None, IncompleteStream)], ids=["status", "end"]
)
async def test_without_reconnect_the_end_is_raised(
    client: GatewayClient, training: FakeTraining, cut: None, kind: type[GatewayError]
) -> None:
    await ran(training)
    training.watch_cuts.append((1, cut))
    async with client.training.watch_job("run", reconnect=False) as watch:
        await following(watch, 1)
        with pytest.raises(kind):
            await asyncio.wait_for(anext(watch), SOON_S)
    assert asked_after(training) == [0]


async def test_a_job_that_is_unknown_is_not_found(client: GatewayClient) -> None:
    with pytest.raises(NotFound) as raised:
        await asyncio.wait_for(anext(client.training.watch_job("nobody")), SOON_S)
    assert raised.value.reason == ErrorReason.ERROR_REASON_JOB_NOT_FOUND


async def test_a_sequence_of_another_state_folder_is_raised(
    client: GatewayClient, training: FakeTraining
) -> None:
    await ran(training)
    text = "the newest event is 0"
    unknown = refusal(grpc.StatusCode.OUT_OF_RANGE, "SEQUENCE_UNKNOWN", text)
    training.watch_cuts.append((1, unknown))
    async with client.training.watch_job("run") as watch:
        await following(watch, 1)
        with pytest.raises(GatewayError, match=text):
            await asyncio.wait_for(anext(watch), SOON_S)


# --- readers


async def test_a_slow_reader_misses_nothing(client: GatewayClient, training: FakeTraining) -> None:
    # Far more than the connection buffers.
    notices = [pb.Notice(code=f"N{number}", message="x" * 16_384) for number in range(300)]
    await training.add_job("run")
    seen: list[int] = []
    async with client.training.watch_job("run") as watch:
        seen += [event.sequence for event in await following(watch, 1)]
        await training.tell("run", *notices, *states("SUCCEEDED"))
        await asyncio.sleep(0.3)
        async for event in watch:
            seen.append(event.sequence)
            if event.sequence % 50 == 0:
                await asyncio.sleep(0.05)
    assert seen == list(range(1, 303))


async def test_a_reader_that_stops_waiting_loses_nothing(
    client: GatewayClient, training: FakeTraining
) -> None:
    await training.add_job("run")
    async with client.training.watch_job("run") as watch:
        await following(watch, 1)
        waiting = asyncio.ensure_future(anext(watch))
        await asyncio.sleep(0.05)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        await training.tell("run", *STEPS, *states("SUCCEEDED"))
        assert await whole(watch) == [2, 3, 4, 5, 6, 7]


async def test_leaving_the_block_ends_the_watch_at_the_server(
    client: GatewayClient, training: FakeTraining
) -> None:
    await training.add_job("run")
    async with client.training.watch_job("run") as watch:
        await following(watch, 1)
    await asyncio.wait_for(training.cancelled.wait(), SOON_S)
    assert [event async for event in watch] == []


async def test_breaking_out_of_a_bare_loop_ends_the_watch_at_the_server(
    client: GatewayClient, training: FakeTraining
) -> None:
    await training.add_job("run")
    gc.disable()  # dropping the last reference must be enough
    try:
        async for _ in client.training.watch_job("run"):
            break
        await asyncio.wait_for(training.cancelled.wait(), SOON_S)
    finally:
        gc.enable()


async def test_a_watch_has_no_deadline(client: GatewayClient, training: FakeTraining) -> None:
    await training.add_job("run")
    async with client.training.watch_job("run") as watch:
        await following(watch, 1)
        assert training.time_remaining_s is None


# --- logs


PRINTED = [b"loading\n", b"step 1\n", "Stück 2\n".encode(), b"end\n"]


async def logged(training: FakeTraining) -> None:
    await ran(training)
    for data in PRINTED:
        await training.log("run", data)


@pytest.mark.parametrize("offset", [0, 3, 8, 20, 27, 28])
async def test_a_log_begins_at_its_offset(
    client: GatewayClient, training: FakeTraining, offset: int
) -> None:
    await logged(training)
    async with client.training.job_logs("run", offset=offset) as logs:
        read = [data async for data in logs]
        assert b"".join(read) == b"".join(PRINTED)[offset:]
        assert logs.offset == 28
    assert all(read)


async def test_a_log_that_breaks_off_goes_on_where_it_stood(
    client: GatewayClient, training: FakeTraining
) -> None:
    await logged(training)
    training.log_cuts.extend([1, 1, 2])
    async with asyncio.timeout(SOON_S):
        read = [data async for data in client.training.job_logs("run")]
    assert b"".join(read) == b"".join(PRINTED)
    offsets = [
        asked.offset for asked in training.requests if isinstance(asked, pb.GetJobLogsRequest)
    ]
    assert offsets == [0, 8, 15]


async def test_a_log_is_followed_to_the_end_of_the_job(
    client: GatewayClient, training: FakeTraining
) -> None:
    await training.add_job("run")
    await training.log("run", b"loading\n")
    async with asyncio.timeout(SOON_S), client.training.job_logs("run", follow=True) as logs:
        assert await anext(logs) == b"loading\n"
        assert training.time_remaining_s is None
        await training.log("run", b"step 1\n")
        assert await anext(logs) == b"step 1\n"
        await training.tell("run", *states("SUCCEEDED"))
        with pytest.raises(StopAsyncIteration):
            await anext(logs)


async def test_bytes_that_are_missing_in_a_log_are_raised(
    client: GatewayClient, training: FakeTraining
) -> None:
    await logged(training)
    training.log_gap_bytes = 2
    async with client.training.job_logs("run") as logs:
        with pytest.raises(IncompleteStream, match="bytes 0 to 2 of the log"):
            await anext(logs)
