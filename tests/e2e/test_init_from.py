"""An adapter is trained, published and trained further, in a real gateway."""

from __future__ import annotations

import uuid
from typing import Any

import grpc
import pytest

from lora_gateway.v1 import adapters_pb2 as ad
from lora_gateway.v1 import training_pb2 as pb
from lora_gateway.v1.adapters_pb2_grpc import AdaptersStub
from lora_gateway.v1.training_pb2_grpc import TrainingStub
from tests.e2e import training
from tests.e2e.training import FACTS

pytestmark = [pytest.mark.timeout(900), pytest.mark.slow]  # a minute

NEW = {"What is the weather?": "It rains upwards today."}


def exactly(**fields: Any) -> pb.Hyperparameters:
    """In the precision in which the tiny model is served."""
    return pb.Hyperparameters(
        quantization=pb.QUANTIZATION_NONE, precision=pb.PRECISION_FLOAT32, **fields
    )


LEARNS = exactly(epochs=15, learning_rate=4e-3)
AS_IT_IS = exactly(max_steps=1, warmup_ratio=1.0, micro_batch_size=2, gradient_accumulation=1)
"""One step with a learning rate of 0, on both facts at once: its loss is what an evaluation of them
measures, and the weights stay what they are."""


async def done(channel: grpc.aio.Channel, name: str, spec: pb.JobSpec) -> pb.Job:
    spec.adapter, spec.backend = spec.adapter or name, pb.BACKEND_PEFT
    await training.create(channel, spec, job_id=name)
    job = await training.ended(channel, name)
    assert job.state == pb.JOB_STATE_SUCCEEDED, job.error
    return job


async def test_init_from_a_version_and_a_checkpoint_that_are_gone_by_then(
    channel: grpc.aio.Channel,
) -> None:
    name = f"further-{uuid.uuid4().hex[:6]}"
    await training.upload(channel, name, training.facts())
    both = f"{name}-both"
    await training.upload(channel, both, training.facts(1))
    job = pb.JobSpec(dataset=name, hyperparameters=LEARNS, lora=pb.LoraSpec(r=16, alpha=32))
    job.data.eval_dataset = both
    job.publish.traffic_percent = 100
    first = await done(channel, name, job)
    assert first.publication.version == 1, first.publication.reasons
    eval_loss = first.progress.eval_loss

    # A job that waits while what it begins with is deleted.
    sources = {
        "version": pb.InitFrom(adapter_version=pb.AdapterVersionSource(adapter=name)),
        "checkpoint": pb.InitFrom(checkpoint=pb.CheckpointSource(job=name)),
    }
    jobs, stub = {}, TrainingStub(channel)
    for kind, init_from in [*sources.items(), ("new", None)]:
        spec = pb.JobSpec(
            dataset=both, adapter=f"{name}-{kind}", hyperparameters=AS_IT_IS, init_from=init_from
        )
        spec.data.eval_fraction, spec.lora.dropout = 0.0, 0.0
        spec.backend = pb.BACKEND_PEFT
        jobs[kind] = await training.create(channel, spec, job_id=f"{name}-{kind}")
        await stub.PauseJob(pb.PauseJobRequest(name=jobs[kind].name))
    effective = jobs["version"].effective_spec
    assert effective.init_from.adapter_version.version == 1
    weights = first.manifest.files["adapter_model.safetensors"]
    assert effective.init_from.weights_sha256 == weights
    assert (effective.lora.r, effective.lora.alpha, effective.lora.dropout) == (16, 32, 0)
    saved = jobs["checkpoint"].effective_spec.init_from
    assert saved.checkpoint.step == first.checkpoint_step and len(saved.weights_sha256) == 64

    adapters = AdaptersStub(channel)
    await adapters.SetTraffic(ad.SetTrafficRequest(adapter=name), timeout=training.TIMEOUT_S)
    gone = ad.DeleteAdapterVersionRequest(adapter=name, version=1)
    await adapters.DeleteAdapterVersion(gone, timeout=training.TIMEOUT_S)
    await stub.DeleteJob(pb.DeleteJobRequest(name=name))

    losses = {}
    for kind, job_there in jobs.items():
        await stub.ResumeJob(pb.ResumeJobRequest(name=job_there.name))
        after = await training.ended(channel, job_there.name)
        assert after.state == pb.JOB_STATE_SUCCEEDED, after.error
        losses[kind] = after.progress.loss
        if kind != "new":  # the served copy of the same weights is the same to the bit
            assert after.manifest.files["adapter_model.safetensors"] == weights
            assert after.manifest.init_from == after.effective_spec.init_from
    print(f"last evaluation {eval_loss:.6f}; first steps {losses}")
    assert losses["version"] == pytest.approx(eval_loss, rel=1e-4, abs=1e-5)
    assert losses["checkpoint"] == pytest.approx(eval_loss, rel=1e-4, abs=1e-5)
    assert losses["new"] > eval_loss + 1.0


async def test_init_from_learns_on_and_the_new_version_names_where_it_comes_from(
    channel: grpc.aio.Channel,
) -> None:
    name = f"on-{uuid.uuid4().hex[:6]}"
    await training.upload(channel, name, training.facts())
    rows = [training.chat(*fact) for fact in {**FACTS, **NEW}.items() for _ in range(8)]
    await training.upload(channel, f"{name}-more", training.lines(rows))
    job = pb.JobSpec(dataset=name, hyperparameters=LEARNS)
    job.publish.traffic_percent = 100
    await done(channel, name, job)
    source = pb.InitFrom(adapter_version=pb.AdapterVersionSource(adapter=name, version=1))
    # Too little to learn the old facts once more.
    few = exactly(epochs=6, learning_rate=4e-3)
    job = pb.JobSpec(dataset=f"{name}-more", adapter=name, hyperparameters=few, init_from=source)
    job.publish.traffic_percent = 0
    second = await done(channel, f"{name}-more", job)
    assert second.publication.version == 2, second.publication.reasons
    for question, fact in {**FACTS, **NEW}.items():
        assert fact in await training.answer(channel, question, name, 2)
    request = ad.GetAdapterVersionRequest(adapter=name, version=2)
    version = (await AdaptersStub(channel).GetAdapterVersion(request)).adapter_version
    assert version.labels["init_from"] == f"{name}@1"
    assert version.labels["job"] == f"{name}-more"
