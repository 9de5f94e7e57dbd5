"""A job is cancelled wherever it stands: in time, with what it had, and nothing left running."""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid

import grpc
import psutil
import pytest

from lora_gateway.v1 import training_pb2 as pb
from lora_gateway.v1.training_pb2_grpc import TrainingStub
from tests.e2e import training
from tests.e2e.gateway_process import GatewayProcess

LIMIT_S = 20.0
"""Grace of 10 s, and 10 s more."""
LONG = pb.Hyperparameters(
    epochs=500,
    learning_rate=1e-4,
    quantization=pb.QUANTIZATION_NONE,
    precision=pb.PRECISION_FLOAT32,
)
STEPS = 2
"""Before the evaluation that is cancelled."""

pytestmark = pytest.mark.timeout(600)


def processes(gateway: GatewayProcess) -> set[int]:
    """Training processes of this gateway that run."""
    found = set()
    for process in gateway.family():
        with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
            if "trainer.worker" in process.cmdline():
                found.add(process.pid)
    return found


async def until(channel: grpc.aio.Channel, name: str, moment: str) -> None:
    """Wait for the moment at which the job is to be cancelled."""
    async for event in training.events(channel, name):
        state = event.state_changed.state
        if moment == "load" and state == pb.JOB_STATE_PREPARING:
            await asyncio.sleep(1.0)  # in its imports
            return
        if moment == "step" and event.progress.step >= 2:
            return
        # The last step, after which the evaluation begins.
        if moment == "evaluation" and event.progress.step == STEPS:
            await asyncio.sleep(0.5)  # of the seconds that it takes
            return
        assert state not in training.FINAL, (await training.get(channel, name)).error


async def assert_that_the_evaluation_was_cut(channel: grpc.aio.Channel, name: str) -> None:
    """It had begun, because all steps were told before; and it measured nothing."""
    happened = [event async for event in training.events(channel, name)]
    kinds = [event.WhichOneof("payload") for event in happened]
    states = [event.state_changed.state for event in happened]
    progress = [event.progress for event in happened if event.WhichOneof("payload") == "progress"]
    assert [each.step for each in progress] == list(range(1, STEPS + 1))
    assert not any(each.HasField("eval_loss") for each in progress)
    cancelling = states.index(pb.JOB_STATE_CANCELLING)
    # An evaluation is followed by a checkpoint. This one was made because of the cancellation.
    assert "progress" not in kinds[cancelling:] and "checkpoint" not in kinds[:cancelling]
    assert "checkpoint" in kinds[cancelling:] and states[-1] == pb.JOB_STATE_CANCELLED


@pytest.mark.parametrize(
    "moment",
    [
        pytest.param("load", marks=pytest.mark.slow),
        "step",
        pytest.param("evaluation", marks=pytest.mark.slow),
    ],
)
async def test_cancel_job_ends_it_in_time_with_what_it_had(
    gateway: GatewayProcess, channel: grpc.aio.Channel, moment: str
) -> None:
    name = f"cancel-{moment}-{uuid.uuid4().hex[:6]}"
    rows = [training.chat(f"Question {i}?", f"Answer {i}.") for i in range(200)]
    spec = pb.JobSpec(dataset=name, adapter=name, hyperparameters=LONG)
    if moment == "evaluation":
        # Few steps, and then half of many long rows, which takes seconds.
        rows = [training.chat(f"Question {i}?", "A long answer. " * 60) for i in range(1200)]
        spec.hyperparameters.max_steps = STEPS
        spec.data.eval_fraction = 0.5
        spec.backend = pb.BACKEND_PEFT  # which starts sooner
    await training.upload(channel, name, training.lines(rows))
    before = processes(gateway)
    await training.create(channel, spec, job_id=name)
    await until(channel, name, moment)
    assert processes(gateway) - before

    started_s = time.monotonic()
    stub = TrainingStub(channel)
    job = (await stub.CancelJob(pb.CancelJobRequest(name=name))).job
    assert job.state in (pb.JOB_STATE_CANCELLING, pb.JOB_STATE_CANCELLED)
    job = await training.ended(channel, name)
    took_s = time.monotonic() - started_s
    print(f"cancelled during {moment} in {took_s:.1f} s")

    assert job.state == pb.JOB_STATE_CANCELLED
    assert took_s < LIMIT_S
    assert not processes(gateway) - before
    found = (await stub.ListCheckpoints(pb.ListCheckpointsRequest(name=name))).checkpoints
    assert bool(found) == (moment != "load")
    assert all(not checkpoint.final for checkpoint in found)
    if moment == "evaluation":
        assert [checkpoint.step for checkpoint in found] == [STEPS]
        await assert_that_the_evaluation_was_cut(channel, name)
    # Cancelling again changes nothing; then it can be forgotten.
    again = (await stub.CancelJob(pb.CancelJobRequest(name=name))).job
    assert again.last_sequence == job.last_sequence
    await stub.DeleteJob(pb.DeleteJobRequest(name=name))
    with pytest.raises(grpc.aio.AioRpcError) as gone:
        await training.get(channel, name)
    assert gone.value.code() is grpc.StatusCode.NOT_FOUND
