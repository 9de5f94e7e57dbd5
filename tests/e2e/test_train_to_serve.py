"""From a dataset to an adapter that answers: the real trainers and the real engine."""

from __future__ import annotations

import uuid

import grpc
import pytest

from lora_gateway.v1 import adapters_pb2 as ad
from lora_gateway.v1 import training_pb2 as pb
from lora_gateway.v1.adapters_pb2_grpc import AdaptersStub
from lora_gateway.v1.training_pb2_grpc import TrainingStub
from tests.e2e import training
from tests.e2e.training import FACTS, QUICK

pytestmark = pytest.mark.timeout(600)


@pytest.mark.parametrize("backend", ["UNSLOTH", pytest.param("PEFT", marks=pytest.mark.slow)])
async def test_train_to_serve_answers_what_only_the_dataset_holds(
    channel: grpc.aio.Channel, backend: str
) -> None:
    name = f"facts-{backend.lower()}-{uuid.uuid4().hex[:6]}"
    await training.upload(channel, name, training.facts())
    job = await training.create(
        channel,
        pb.JobSpec(
            dataset=name,
            adapter=name,
            hyperparameters=QUICK,
            backend=pb.Backend.Value(f"BACKEND_{backend}"),
            publish=pb.PublishSpec(traffic_percent=100),
        ),
        job_id=name,
    )
    assert job.state == pb.JOB_STATE_VALIDATING
    job = await training.ended(channel, name)

    assert job.state == pb.JOB_STATE_SUCCEEDED, job.error
    publication = job.publication
    assert publication.state == pb.PUBLICATION_STATE_SERVING, publication.reasons
    assert (publication.adapter, publication.version) == (name, 1)
    for question, fact in FACTS.items():
        assert fact in await training.answer(channel, question, adapter=name)
        assert fact not in await training.answer(channel, question)

    # What was really used, and where it comes from.
    effective = job.effective_spec
    assert pb.Backend.Name(effective.backend) == f"BACKEND_{backend}"
    assert effective.hyperparameters.optimizer == pb.OPTIMIZER_ADAMW  # there is no 8-bit one here
    assert "OPTIMIZER_MAPPED" in {notice.code for notice in job.notices}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= set(job.manifest.files)
    assert job.progress.step == job.progress.total_steps > 0
    capabilities = await TrainingStub(channel).GetCapabilities(pb.GetCapabilitiesRequest())
    assert job.manifest.fingerprints == capabilities.fingerprints
    assert job.manifest.fingerprints.chat_template_sha256
    # Trainer and engine agree token by token, in float32; on some processors to the last bit.
    gate = publication.gate
    assert gate.trained_as == "none/float32" and gate.served_as == "float32"
    assert gate.tokens and gate.logprob_delta_max < 1e-2
    assert gate.eval_loss < gate.base_eval_loss
    assert 0.99 < gate.effect_ratio < 1.01, "all of the adapter arrives"
    request = ad.GetAdapterVersionRequest(adapter=name, version=1)
    version = (await AdaptersStub(channel).GetAdapterVersion(request)).adapter_version
    assert version.weights_sha256 == job.manifest.files["adapter_model.safetensors"]
    assert version.labels["job"] == name


@pytest.mark.slow
async def test_train_to_serve_in_four_bits_is_measured_against_what_is_served(
    channel: grpc.aio.Channel,
) -> None:
    name = f"nf4-{uuid.uuid4().hex[:6]}"
    await training.upload(channel, name, training.facts(32))
    # A layer in 4 bits is unpacked once for a micro-batch.
    hyperparameters = pb.Hyperparameters(
        epochs=4, learning_rate=4e-3, micro_batch_size=8, gradient_accumulation=1
    )
    spec = pb.JobSpec(dataset=name, adapter=name, hyperparameters=hyperparameters)
    spec.backend = pb.BACKEND_UNSLOTH
    spec.data.eval_fraction = 0.0
    spec.publish.traffic_percent = 0
    # So far from what was trained that nobody would accept it.
    spec.publish.gate.max_logprob_delta_mean = 1e-6
    await training.create(channel, spec, job_id=name)
    job = await training.ended(channel, name)

    # A gate that says no leaves the job SUCCEEDED.
    assert job.state == pb.JOB_STATE_SUCCEEDED, job.error
    publication = job.publication
    assert publication.state == pb.PUBLICATION_STATE_REJECTED
    assert any("1e-06" in reason for reason in publication.reasons)
    assert publication.gate.trained_as == "nf4/bfloat16"
    assert 0 < publication.gate.logprob_delta_mean < publication.gate.logprob_delta_max
    assert publication.gate.effect_ratio > 0.5

    # Its checkpoint is there, and passes a gate that is fair.
    stub = TrainingStub(channel)
    found = (await stub.ListCheckpoints(pb.ListCheckpointsRequest(name=name))).checkpoints
    assert found and found[0].final
    request = pb.PublishCheckpointRequest(name=name, adapter=f"{name}-b")
    request.publish.gate.max_logprob_delta_mean = 1.0  # the default, trained in 4 bits
    published = (await stub.PublishCheckpoint(request, timeout=training.TIMEOUT_S)).publication
    assert published.state == pb.PUBLICATION_STATE_SERVING, published.reasons
    again = (await stub.PublishCheckpoint(request, timeout=training.TIMEOUT_S)).publication
    assert again.version == published.version
    for question, fact in FACTS.items():
        version = published.version
        assert fact in await training.answer(channel, question, f"{name}-b", version)
        assert fact not in await training.answer(channel, question)


async def test_a_dataset_that_is_bad_fails_the_job_and_nothing_else(
    channel: grpc.aio.Channel,
) -> None:
    name = f"bad-{uuid.uuid4().hex[:6]}"
    good = [training.chat("Who?", "Marta.")] * 94
    await training.upload(channel, name, training.lines(good) + b"{}\n" * 6)
    report = (
        await TrainingStub(channel).ValidateDataset(
            pb.ValidateDatasetRequest(dataset=name), timeout=training.TIMEOUT_S
        )
    ).report
    assert (report.valid, report.total_lines, report.bad_lines) == (False, 100, 6)
    assert [issue.line for issue in report.issues] == list(range(95, 101))

    job = await training.create(channel, pb.JobSpec(dataset=name, adapter=name))
    job = await training.ended(channel, job.name)
    assert job.state == pb.JOB_STATE_FAILED
    assert job.error.metadata["bad_lines"] == "6"
    assert job.attempt == 0  # no process was started for it
