"""A disk that fills up, at each place where a job needs it: the job ends, and nothing else does.

On a real file system that is really full, with real training processes.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
import pytest_asyncio

from lora_gateway.v1 import errors_pb2
from lora_gateway.v1 import training_pb2 as pb
from lora_gateway.v1.training_pb2_grpc import TrainingStub
from tests.details import error_info
from tests.e2e import training
from tests.e2e.scripted_gateway import ScriptedGateway, Watch, scripted_gateway
from tests.e2e.small_disk import SmallDisk, small_disk
from tests.trainer.scripted_worker import Script

DISK_BYTES = 96 * 1024**2
KIB = 1024
DATABASE_BYTES = 256 * KIB
"""Room enough for what the host writes down of some jobs, and for no checkpoint."""

pytestmark = [pytest.mark.timeout(900), pytest.mark.slow]

QUICK_SCRIPT = Script(steps=2)
STEPS = 40


@dataclass
class Full:
    """A gateway whose state is on a disk that a test fills."""

    gateway: ScriptedGateway
    disk: SmallDisk

    async def serves(self) -> None:
        """Inference takes no notice."""
        async with self.gateway.channel() as channel:
            assert await training.answer(channel, "Who keeps the light?")

    async def failed(self, name: str) -> pb.Job:
        """The job, which has FAILED for want of space, and left nothing half done."""
        job = await Watch(self.gateway, name).end()
        assert job.state == pb.JOB_STATE_FAILED, job
        assert job.error.reason == errors_pb2.ERROR_REASON_STORAGE_FULL, job.error
        assert "free some space" in job.error.message
        assert self.left_over(name) == []
        return job

    async def next_job_goes_on(self, name: str) -> None:
        """One that needs little room."""
        job = await Watch(self.gateway, name).end()
        assert job.state == pb.JOB_STATE_SUCCEEDED, job.error

    def left_over(self, name: str) -> list[str]:
        """What is no whole file of a job, or of a preparation."""
        state = self.gateway.state
        found = list((state / "prepared").glob("*.partial-*"))
        for attempt in self.attempts(name):
            found += attempt.rglob("*.new")
            found += attempt.glob("rows")
            folders = (attempt / "checkpoints").glob("checkpoint-*")
            found += (each for each in folders if each.is_dir() and not _is_whole(each))
        found += (state / "staging").iterdir()
        return [str(path.relative_to(state)) for path in found]

    def attempts(self, name: str) -> list[Path]:
        """Folders of a job's attempts."""
        plans = (self.gateway.state / "jobs").glob("*/attempts/*/plan.json")
        return [plan.parent for plan in plans if json.loads(plan.read_text())["job"] == name]

    async def publish(self, name: str) -> pb.Publication:
        request = pb.PublishCheckpointRequest(name=name)
        async with self.gateway.channel() as channel:
            stub = TrainingStub(channel)
            return (await stub.PublishCheckpoint(request, timeout=120)).publication


def _is_whole(checkpoint: Path) -> bool:
    return (checkpoint / "manifest.json").exists()


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def full(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Full]:
    folder = tmp_path_factory.mktemp("full")
    with small_disk(folder / "state", DISK_BYTES) as disk, scripted_gateway(folder) as gateway:
        async with gateway.channel() as channel:
            await training.upload(channel, "facts", training.facts())
            await training.upload(channel, "many", training.facts(150))
        yield Full(gateway, disk)


@pytest.fixture(autouse=True)
def room_again(full: Full) -> None:
    full.disk.free()


async def test_disk_full_while_rows_are_prepared(full: Full) -> None:
    drawn = random.Random(1)
    words = [
        training.chat(drawn.randbytes(50).hex(), drawn.randbytes(50).hex()) for _ in range(4000)
    ]
    async with full.gateway.channel() as channel:
        await training.upload(channel, "words", training.lines(words))
    full.disk.leave(DATABASE_BYTES)
    await full.gateway.create("rows", dataset="words")
    job = await full.failed("rows")
    assert job.attempt == 0
    await full.serves()
    await full.gateway.create("rows-next", QUICK_SCRIPT)
    await full.next_job_goes_on("rows-next")

    full.disk.free()
    await full.gateway.create("rows-again", QUICK_SCRIPT, dataset="words")
    await full.next_job_goes_on("rows-again")


@pytest.mark.parametrize("place", ["checkpoint", "adapter"])
async def test_disk_full_while_it_saves(full: Full, place: str) -> None:
    """A checkpoint after others, or the only one, which is the adapter."""
    name, others = f"save-{place}", place == "checkpoint"
    if others:
        await full.gateway.create(name, epochs=1000)
    else:
        await full.gateway.create(name, dataset="many", epochs=1)
    await full.gateway.create(f"{name}-next", QUICK_SCRIPT)
    await Watch(full.gateway, name).until(step=3)
    full.disk.leave(DATABASE_BYTES)
    await full.serves()
    job = await full.failed(name)
    assert job.attempt == 1, "the next would fill it as well"
    await full.next_job_goes_on(f"{name}-next")

    full.disk.free()
    [attempt] = full.attempts(name)
    whole = list((attempt / "checkpoints").glob("checkpoint-*"))
    assert bool(whole) == others
    if others:
        publication = await full.publish(name)
        assert publication.state == pb.PUBLICATION_STATE_SERVING, publication.reasons


async def test_disk_full_to_the_last_byte(full: Full) -> None:
    """Neither what happened nor why it failed can be written: not by the process, not by us."""
    await full.gateway.create("events", dataset="many", epochs=1)
    await Watch(full.gateway, "events").until(step=3)
    async with asyncio.timeout(120):
        while full.gateway.training():
            full.disk.leave(0)  # what is removed makes room again
            await asyncio.sleep(0.02)
    await full.serves()
    full.disk.free()
    job = await full.failed("events")
    assert job.attempt == 1 and 0 < job.progress.step < job.progress.total_steps
    assert not list(full.attempts("events")[0].glob("exit.json")), "it could not say so"


async def test_disk_full_while_it_is_published(full: Full) -> None:
    await full.gateway.create("publish", epochs=2)
    watch = Watch(full.gateway, "publish")
    job = await watch.end()
    assert job.state == pb.JOB_STATE_SUCCEEDED, job.error
    size_bytes = max(event.checkpoint.size_bytes for event in watch.events)
    before = await full.gateway.versions()

    await full.gateway.create("publish-full", dataset="many", epochs=1, publish=True)
    watch = Watch(full.gateway, "publish-full")
    await watch.until(step=3)
    # The checkpoint has room, and the copy that would be served has not.
    full.disk.leave(size_bytes + size_bytes // 8)
    job = await watch.end()
    assert job.state == pb.JOB_STATE_SUCCEEDED, job.error
    assert job.publication.state == pb.PUBLICATION_STATE_FAILED
    assert "No space left on device" in job.publication.reasons[0], job.publication
    assert full.left_over("publish-full") == []
    await full.serves()
    failed = await full.gateway.versions()
    assert failed == [*before, "VERSION_STATE_FAILED"]

    full.disk.free()
    for _ in range(2):
        publication = await full.publish("publish-full")
        assert publication.state == pb.PUBLICATION_STATE_SERVING, publication.reasons
    assert await full.gateway.versions() == [*failed, "VERSION_STATE_READY"], "one, however often"


async def test_disk_full_in_the_database(full: Full) -> None:
    """What is asked for is refused and can be asked again; what happened is written down later."""
    await full.gateway.create("database", Script(steps=STEPS, step_s=0.5, wait_for="go"))
    watch = Watch(full.gateway, "database")
    await watch.until(step=1)
    # The process has room for what it says, and we have none for it.
    [attempt] = full.attempts("database")
    full.disk.reserve(attempt / "events.ndjson", 64 * KIB)
    full.disk.leave(0)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        for number in range(100):  # until what it has room for is used up
            await full.gateway.create(f"refused-{number}")
            await full.gateway.wish("Cancel", f"refused-{number}")
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert error_info(caught.value).reason == "STORAGE_FULL"
    await full.serves()
    await asyncio.to_thread(full.gateway.process.wait_log, r"job database, RUNNING", 60.0)
    assert (await full.gateway.get("database")).state == pb.JOB_STATE_RUNNING

    full.disk.free()
    (full.gateway.state / "go").touch()
    job = await watch.end()
    assert job.state == pb.JOB_STATE_SUCCEEDED, job.error
    assert watch.steps == list(range(1, STEPS + 1)) and job.attempt == 1
