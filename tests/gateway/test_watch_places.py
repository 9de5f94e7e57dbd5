"""Who watches has places of its own: it shuts nobody out, and costs next to nothing."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import grpc
import pytest

from engine.models import resolve_model
from gateway import control
from lora_gateway.v1 import adapters_pb2, training_pb2
from lora_gateway.v1.training_pb2_grpc import TrainingStub
from store.job_records import EventKind, JobChange, JobEventRecord, JobRecord, NewEvent, NewJob
from store.sqlite_jobs import SqliteJobs
from tests.gateway.control_plane import TENANT, TIMEOUT_S, Plane, control_plane
from tests.gateway.promises import refused
from tests.gateway.training_calls import upload
from trainer.journal import Journal

PLACES = 3
MANY = 1100
"""More than a connection of HTTP/2 carries by our own settings; see gateway/server.py."""


class Watched:
    """A control plane with one job, in which nothing happens but what a test writes."""

    def __init__(self, plane: Plane) -> None:
        self.plane = plane
        self.stub: Any = TrainingStub(plane.gateway.channel)
        training: Any = plane.control._training
        self.store: SqliteJobs = training.store
        self.journal: Journal = training._jobs._journal

    async def add_job(self) -> JobRecord:
        """A job that nobody brings to its end."""
        await self.store.add_dataset(TENANT, "rows", sha256="0" * 64, size_bytes=1, format="")
        new = NewJob(TENANT, "night", "sql", "rows", "", {"dataset": "rows", "adapter": "sql"})
        return await self.store.create_job(
            new,
            effective_spec={},
            fingerprints={},
            publication={"state": "not_requested", "adapter": "sql"},
            request_id="",
            max_active=9,
        )

    def watch(self) -> Any:
        return self.stub.WatchJob(training_pb2.WatchJobRequest(name="night"))

    def follow_log(self) -> Any:
        return self.stub.GetJobLogs(training_pb2.GetJobLogsRequest(name="night", follow=True))

    def watch_adapters(self) -> Any:
        return self.plane.stub.WatchAdapters(adapters_pb2.WatchAdaptersRequest())

    async def until_held(self, count: int) -> None:
        async with asyncio.timeout(TIMEOUT_S):
            while self.plane.control._watches.held != count:
                await asyncio.sleep(0.01)


@contextlib.asynccontextmanager
async def watched(
    folder: Path, monkeypatch: pytest.MonkeyPatch, **options: Any
) -> AsyncIterator[Watched]:
    async with control_plane(folder, monkeypatch, **options) as plane:
        watched = Watched(plane)
        await watched.add_job()
        yield watched


def connection(plane: Plane, *options: tuple[str, int]) -> grpc.aio.Channel:
    """One of its own."""
    return grpc.aio.insecure_channel(
        plane.gateway.address, [("grpc.use_local_subchannel_pool", 1), *options]
    )


async def first(call: Any) -> Any:
    async with asyncio.timeout(TIMEOUT_S):
        return await call.read()


async def test_watches_that_hold_all_their_places_keep_nobody_from_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "MAX_WATCHES", PLACES)
    monkeypatch.setattr(control, "MAX_STREAMS", 1)
    model = resolve_model("tiny", tmp_path / "models")
    options = {"model": model, "training_devices": ["cpu"]}
    async with watched(tmp_path, monkeypatch, **options) as at:
        held = [at.watch(), at.follow_log(), at.watch_adapters()]
        await at.until_held(PLACES)
        await upload(at.stub)
        validate = training_pb2.ValidateDatasetRequest(dataset="faq")
        assert (await at.stub.ValidateDataset(validate)).report.valid

        kinds: Sequence[Callable[[], Any]] = (at.watch, at.follow_log, at.watch_adapters)
        for kind in kinds:
            refusal = await refused(first(kind()))  # which also looks for its RetryInfo
            assert (refusal.reason, refusal.metadata) == ("OVERLOADED", {"limit": str(PLACES)})
        # A log that is not followed ends by itself, so it needs no such place.
        log = at.stub.GetJobLogs(training_pb2.GetJobLogsRequest(name="night"))
        assert [piece async for piece in log] == []
        held.pop().cancel()
        await at.until_held(PLACES - 1)
        assert await first(at.watch())


async def test_more_watches_than_a_connection_carries_calls_leave_room_for_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with watched(tmp_path, monkeypatch) as at, contextlib.AsyncExitStack() as owned:
        # Callers have connections of their own; it is the worker that has one to the host.
        stubs: list[Any] = [
            TrainingStub(await owned.enter_async_context(connection(at.plane))) for _ in range(2)
        ]
        request = training_pb2.WatchJobRequest(name="night")
        calls = [stubs[number % 2].WatchJob(request) for number in range(MANY)]
        async with asyncio.timeout(60):
            messages = await asyncio.gather(*(call.read() for call in calls))
            assert [message.event.sequence for message in messages] == [1] * MANY
            await at.stub.GetDataset(training_pb2.GetDatasetRequest(name="rows"))


async def test_a_reader_that_never_reads_costs_the_job_and_others_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count, message = 600, "x" * 20_000  # 12 MB
    async with watched(tmp_path, monkeypatch) as at:
        read: list[int] = []
        job_events = at.store.job_events

        async def counted(*names: str, **bounds: Any) -> list[JobEventRecord]:
            found = await job_events(*names, **bounds)
            read.extend(event.sequence for event in found)
            return found

        monkeypatch.setattr(at.store, "job_events", counted)
        notice = NewEvent(EventKind.NOTICE, {"code": "A", "message": message})
        job = await at.store.change_job(
            await at.store.job(TENANT, "night"), JobChange(events=[notice] * count)
        )
        # One whose gRPC takes in no more than it has to. Some take megabytes, at their own cost.
        channel = connection(at.plane, ("grpc.http2.bdp_probe", 0))
        stuck: Any = TrainingStub(channel).WatchJob(training_pb2.WatchJobRequest(name="night"))
        assert await first(stuck)
        before = -1
        while before != len(read):  # until no buffer takes more
            before = len(read)
            await asyncio.sleep(0.5)
        assert max(read) < count / 2, "it waits for its reader, and holds no more"

        other = at.watch()
        async with asyncio.timeout(TIMEOUT_S):
            for sequence in range(1, count + 2):
                assert (await other.read()).event.sequence == sequence
            clock = asyncio.get_running_loop().time
            begun_s = clock()
            await at.journal.change(job, JobChange(events=[notice]))
            assert (await other.read()).event.sequence == count + 2
            assert clock() - begun_s < 1.0
        assert not stuck.done()
        await channel.close()
