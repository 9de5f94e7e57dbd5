"""Watchers that come, go, sleep and resume see every event of a job once."""

from __future__ import annotations

import asyncio
import contextlib
import random
import uuid
from typing import Any

import grpc
import pytest

from lora_gateway.v1 import training_pb2 as pb
from lora_gateway.v1.training_pb2_grpc import TrainingStub
from tests.e2e import training
from tests.e2e.gateway_process import GatewayProcess

WATCHERS = 12

pytestmark = pytest.mark.timeout(600)


async def restless(address: str, name: str, seed: int) -> list[int]:
    """Sequences that a watcher saw which leaves and comes back, on connections of its own."""
    random_ = random.Random(seed)
    seen: list[int] = []
    while True:
        async with grpc.aio.insecure_channel(address) as channel:
            stays = random_.randint(1, 100)
            stream = training.events(channel, name, after=seen[-1] if seen else 0)
            async with contextlib.aclosing(stream):
                async for event in stream:
                    seen.append(event.sequence)
                    final = event.state_changed.state in training.FINAL
                    if final:
                        return seen
                    stays -= 1
                    if not stays:
                        break
        await asyncio.sleep(random_.random() / 4)


async def sleepy(gateway: GatewayProcess, channel: grpc.aio.Channel, name: str) -> list[int]:
    """Sequences that a watcher saw which reads one event, and the others after the job's end.

    It lets little through before it reads, so that the buffers of both sides are full by then,
    and the gateway waits for it with the rest.
    """
    options = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 1024)]
    async with grpc.aio.insecure_channel(gateway.address, options=options) as own:
        call: Any = TrainingStub(own).WatchJob(pb.WatchJobRequest(name=name))
        seen = [(await call.read()).event.sequence]
        await training.ended(channel, name)
        async with asyncio.timeout(30):
            while not sum(await asyncio.to_thread(gateway.metrics, "gateway_stalled_streams")):
                await asyncio.sleep(0.1)
        while (message := await call.read()) is not grpc.aio.EOF:
            if message.WhichOneof("item") == "event":
                seen.append(message.event.sequence)
        return seen


@pytest.mark.slow
async def test_watchers_that_come_go_sleep_and_resume_see_every_sequence_once(
    gateway: GatewayProcess, channel: grpc.aio.Channel
) -> None:
    name = f"watched-{uuid.uuid4().hex[:6]}"
    await training.upload(channel, name, training.facts(320))
    # As many steps as there are rows: events for more than the 64 KiB that gRPC buffers.
    hyperparameters = pb.Hyperparameters(micro_batch_size=1, gradient_accumulation=1)
    hyperparameters.MergeFrom(training.QUICK)
    hyperparameters.epochs = 1
    spec = pb.JobSpec(dataset=name, adapter=name, hyperparameters=hyperparameters)
    spec.backend = pb.BACKEND_PEFT
    spec.data.eval_fraction = 0.0
    await training.create(channel, spec, job_id=name)
    seen = await asyncio.gather(
        *(restless(gateway.address, name, seed) for seed in range(WATCHERS)),
        sleepy(gateway, channel, name),
    )
    job = await training.get(channel, name)
    assert job.state == pb.JOB_STATE_SUCCEEDED, job.error
    everything = list(range(1, job.last_sequence + 1))
    assert len(everything) > 640
    for sequences in seen:
        assert sequences == everything
    # After the end the whole story is told again, and the stream ends by itself.
    replay = [event async for event in training.events(channel, name)]
    assert [event.sequence for event in replay] == everything
    states = [e.state_changed.state for e in replay if e.WhichOneof("payload") == "state_changed"]
    assert states == [
        pb.JOB_STATE_VALIDATING,
        pb.JOB_STATE_QUEUED,
        pb.JOB_STATE_PREPARING,
        pb.JOB_STATE_RUNNING,
        pb.JOB_STATE_FINALIZING,
        pb.JOB_STATE_SUCCEEDED,
    ]
    steps = [e.progress for e in replay if e.WhichOneof("payload") == "progress"]
    assert [p.step for p in steps if p.HasField("loss")] == list(
        range(1, job.progress.total_steps + 1)
    )
    assert steps[-1].loss < steps[0].loss


async def test_a_watch_of_a_job_that_is_not_there_is_refused(
    channel: grpc.aio.Channel,
) -> None:
    name = f"gone-{uuid.uuid4().hex[:6]}"
    stub = TrainingStub(channel)
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        async for _ in stub.WatchJob(pb.WatchJobRequest(name=name)):
            pass
    assert refused.value.code() is grpc.StatusCode.NOT_FOUND
