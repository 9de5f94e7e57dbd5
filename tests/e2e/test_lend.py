"""Shards of a real gateway lend their device to jobs: what callers see of it, and what kills do.

On a CPU an engine cannot sleep, so it ends and another one is started. The rest is the same.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2
from grpc_health.v1.health_pb2_grpc import HealthStub

from lora_gateway.v1 import admin_pb2
from lora_gateway.v1 import training_pb2 as pb
from lora_gateway.v1.admin_pb2_grpc import AdminStub
from tests.details import detail, error_info
from tests.e2e import training
from tests.e2e.scripted_gateway import ScriptedGateway, Watch, scripted_gateway
from tests.e2e.shard_calls import ask, ask_often
from tests.trainer.scripted_worker import Script

STEPS = 30
WAITS = Script(steps=STEPS, step_s=0.1, save_at=2, wait_for="go")
"""Trains until the test says so."""
LONG = Script(steps=300, step_s=0.1)
"""Trains for so long that it hears what is asked of it before it is through."""
SOON_S = 240.0
"""An engine starts within it, on a busy machine."""
SERVING, NOT_SERVING = (
    health_pb2.HealthCheckResponse.SERVING,
    health_pb2.HealthCheckResponse.NOT_SERVING,
)

pytestmark = [pytest.mark.timeout(900), pytest.mark.slow]


@contextlib.contextmanager
def lending(folder: Path, adapter: Path, *flags: str) -> Iterator[ScriptedGateway]:
    extra = ["--adapter", f"alpha={adapter}", "--lend-rest-s", "2", *flags]
    with scripted_gateway(folder, extra) as found:
        yield found


async def upload(gateway: ScriptedGateway) -> None:
    async with gateway.channel() as channel:
        await training.upload(channel, "facts", training.facts())


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def alone(
    adapters: Mapping[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[ScriptedGateway]:
    """A gateway of one shard, which lends it."""
    folder = tmp_path_factory.mktemp("alone")
    with lending(folder, adapters["alpha"], "--lend-shards", "always") as found:
        await upload(found)
        yield found


async def text(gateway: ScriptedGateway, adapter: str) -> str:
    return (await ask(gateway.process.address, adapter)).completions[0].text


async def state(gateway: ScriptedGateway, number: int) -> str:
    async with gateway.channel() as channel:
        answer = await AdminStub(channel).ListShards(admin_pb2.ListShardsRequest(), timeout=30)
    name = admin_pb2.ShardState.Name(answer.shards[number].state)
    return name.removeprefix("SHARD_STATE_")


async def health(gateway: ScriptedGateway) -> int:
    async with gateway.channel() as channel:
        request = health_pb2.HealthCheckRequest()
        stub: Any = HealthStub(channel)
        return int((await stub.Check(request, timeout=30)).status)


async def used(gateway: ScriptedGateway) -> set[str]:
    """Shards that answer when several ask at once."""
    answers = await ask_often(gateway.process.address, "", 8)
    return {answer.served_by.shard for answer in answers}


async def until_serving(gateway: ScriptedGateway) -> None:
    async with asyncio.timeout(SOON_S):
        while await health(gateway) != SERVING:
            await asyncio.sleep(0.1)


async def resting(gateway: ScriptedGateway, watch: Watch, name: str) -> None:
    """Have the job rest, so that the shard is not lent again meanwhile, and serves."""
    while (await gateway.wish("Pause", name)).state != pb.JOB_STATE_PAUSED:
        await asyncio.sleep(0.1)
    await until_serving(gateway)


def notices(watch: Watch) -> list[tuple[str, str]]:
    """Codes of notices and states of the job, in their order, with what notices say."""
    return [
        (event.notice.code, event.notice.message)
        if event.HasField("notice")
        else (pb.JobState.Name(event.state_changed.state).removeprefix("JOB_STATE_"), "")
        for event in watch.events
        if event.HasField("notice") or event.HasField("state_changed")
    ]


async def test_lend_of_the_only_shard_is_announced_and_measured(alone: ScriptedGateway) -> None:
    before = await text(alone, "alpha"), await text(alone, "")
    async with alone.channel() as channel:
        seen: list[int] = []
        stub: Any = HealthStub(channel)

        async def follow() -> None:
            async for told in stub.Watch(health_pb2.HealthCheckRequest()):
                seen.append(told.status)

        watching = asyncio.create_task(follow())
        await alone.create("lent", WAITS)
        watch = Watch(alone, "lent")
        await watch.until(step=1)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await ask(alone.process.address, "alpha")
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
        info = error_info(refused.value)
        assert (info.reason, info.metadata["shard"]) == ("SHARD_LENT", "shard-0")
        retry = detail(refused.value, error_details_pb2.RetryInfo)
        assert retry.retry_delay.ToTimedelta().total_seconds() == 30
        assert (await health(alone), await state(alone, 0)) == (NOT_SERVING, "LENT")
        assert alone.process.metrics("gateway_shard_lent", shard="shard-0") == [1.0]
        assert not [p for p in alone.process.family() if "EngineCore" in " ".join(p.cmdline())]
        (alone.state / "go").touch()
        job = await watch.end()
        await until_serving(alone)
        watching.cancel()
    (alone.state / "go").unlink()
    assert job.state == pb.JOB_STATE_SUCCEEDED, job.error
    assert (await text(alone, "alpha"), await text(alone, "")) == before
    assert seen[:3] == [SERVING, NOT_SERVING, SERVING]
    order = [what for what, _ in notices(watch)]
    assert order.index("DEVICE_LENT") < order.index("PREPARING"), "before anybody noticed"
    assert order.index("FINALIZING") < order.index("DEVICE_RETURNED") < order.index("SUCCEEDED")
    told = dict(notices(watch))
    assert "calls of Inference are refused with SHARD_LENT" in told["DEVICE_LENT"]
    assert "takes requests again after" in told["DEVICE_RETURNED"]
    (outage_s,) = alone.process.metrics("gateway_shard_lent_seconds_sum", shard="shard-0")
    assert f"after {outage_s:.1f} s" in told["DEVICE_RETURNED"] and outage_s > 0.1 * STEPS
    print(f"lent for {outage_s:.1f} s: {told['DEVICE_RETURNED']}")


async def test_lend_ends_when_the_trainer_is_killed_and_is_asked_for_again(
    alone: ScriptedGateway,
) -> None:
    await alone.create("killed", WAITS)
    watch = Watch(alone, "killed")
    await watch.until(step=3)
    for process in alone.training():
        process.kill()
    await watch.until(pb.JOB_STATE_RECOVERING)
    await resting(alone, watch, "killed")
    assert await text(alone, "alpha"), "it serves"
    await alone.wish("Resume", "killed")
    (alone.state / "go").touch()
    job = await watch.end()
    (alone.state / "go").unlink()
    assert job.state == pb.JOB_STATE_SUCCEEDED, job.error
    assert job.attempt >= 2  # one may have begun before it was paused
    assert [what for what, _ in notices(watch)].count("DEVICE_LENT") >= 2
    assert set(watch.steps) == set(range(1, STEPS + 1))


async def test_lend_with_real_training_is_published_once_the_shard_is_back(
    alone: ScriptedGateway,
) -> None:
    await until_serving(alone)
    await alone.create("real", publish=True, epochs=15)
    job = await Watch(alone, "real").end()
    assert job.state == pb.JOB_STATE_SUCCEEDED, job.error
    assert job.publication.state == pb.PUBLICATION_STATE_SERVING, job.publication
    question = next(iter(training.FACTS))
    async with alone.channel() as channel:
        told = await training.answer(channel, question, "facts", 1)
        assert told != await training.answer(channel, question)


async def test_lend_and_the_host_is_killed(alone: ScriptedGateway) -> None:
    await until_serving(alone)
    await alone.create("host", LONG)
    watch = Watch(alone, "host")
    await watch.until(step=3)
    (process,) = alone.training()
    alone.kill_and_start()
    assert not process.is_running(), "its device was taken back before the engine started"
    await resting(alone, watch, "host")
    assert await text(alone, "alpha"), "it serves"
    await alone.wish("Resume", "host")
    job = await watch.end()
    assert job.state == pb.JOB_STATE_SUCCEEDED, job.error
    assert (job.lost_steps, job.attempts_left) == (0, 3), "nothing is counted"
    assert watch.steps == list(range(1, LONG.steps + 1)), "each once"
    order = [what for what, _ in notices(watch)]
    begin = order.index("DEVICE_RECLAIMED")
    assert order[begin - 1 : begin + 3] == ["PAUSING", "DEVICE_RECLAIMED", "PAUSED", "QUEUED"]
    assert "DEVICE_LENT" in order[begin:]
    await until_serving(alone)


async def test_lend_of_one_of_two_shards_fails_no_call(
    adapters: Mapping[str, Path], tmp_path: Path
) -> None:
    flags = ("--shards", "2", "--lend-shards", "spare", "--lend-limit-s", "20")
    with lending(tmp_path, adapters["alpha"], *flags) as two:
        await upload(two)
        served: list[str] = []
        over = asyncio.Event()

        async def call() -> None:
            while not over.is_set():
                for adapter in ("alpha", ""):
                    answer = await ask(two.process.address, adapter)
                    served.append(answer.served_by.shard)

        calling = asyncio.create_task(call())
        before = await text(two, "alpha")
        await two.create("spare", LONG)
        watch = Watch(two, "spare")
        await watch.until(step=1)
        assert await state(two, 1) == "LENT"
        lent_from = len(served)
        assert await health(two) == SERVING
        await watch.until(pb.JOB_STATE_PAUSED)  # the limit
        during = served[lent_from + 1 :]  # one may have been on its way
        assert during and set(during) == {"shard-0"}
        job = await watch.end()
        assert (job.state, job.lost_steps) == (pb.JOB_STATE_SUCCEEDED, 0), job.error
        async with asyncio.timeout(SOON_S):
            while "shard-1" not in await used(two):
                await asyncio.sleep(0.2)
        over.set()
        await calling  # and none failed
        assert await text(two, "alpha") == before
        codes = [what for what, _ in notices(watch)]
        assert "DEVICE_RECALLED" in codes and codes.count("DEVICE_LENT") >= 2
        (count,) = two.process.metrics("gateway_shard_lent_seconds_count", shard="shard-1")
        assert count == codes.count("DEVICE_LENT")
        assert two.process.metrics("gateway_shard_lent_seconds_count", shard="shard-0") == [0.0]
