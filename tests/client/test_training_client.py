"""The client of the Training service: what it sends, what it answers, what it raises."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration

from lora_gateway import (
    Backend,
    DataSpec,
    ErrorReason,
    FailedPrecondition,
    GateSpec,
    GatewayClient,
    GatewayError,
    Hyperparameters,
    InvalidRequest,
    JobSpec,
    JobState,
    LoraSpec,
    NotFound,
    Overloaded,
    PublicationState,
    PublishSpec,
    Quantization,
    Unavailable,
)
from lora_gateway.job_spec import JobKeywords
from lora_gateway.v1 import training_pb2 as pb
from tests.client.fake_adapters import UNAVAILABLE, refusal
from tests.client.fake_training import FakeTraining, served, states

SLACK_S = 5.0


@pytest.fixture
def training() -> FakeTraining:
    training = FakeTraining()
    training.add_dataset("data")
    return training


@pytest.fixture
async def client(training: FakeTraining) -> AsyncIterator[GatewayClient]:
    async with served(training) as target, GatewayClient(target) as client:
        yield client


# --- datasets


async def test_validating_sends_how_it_is_used_and_returns_the_report(
    client: GatewayClient, training: FakeTraining
) -> None:
    training.report = pb.DatasetReport(valid=False, reasons=["6 % of the lines are bad"])
    data = DataSpec(max_bad_ratio=0.1)
    report = await client.training.validate_dataset("data", data=data, max_issues=5)
    assert report == training.report
    assert training.requests == [pb.ValidateDatasetRequest(dataset="data", data=data, max_issues=5)]


async def test_a_preview_names_its_line(client: GatewayClient, training: FakeTraining) -> None:
    assert await client.training.preview_tokens("data", 3) == training.preview
    assert training.requests == [pb.PreviewTokensRequest(dataset="data", line=3)]


async def test_datasets_are_listed_page_by_page_got_and_deleted(
    client: GatewayClient, training: FakeTraining
) -> None:
    for name in ("a", "b", "c"):
        training.add_dataset(name)
    names = [dataset.name async for dataset in client.training.list_datasets(page_size=2)]
    assert names == ["a", "b", "c", "data"]
    assert len(training.requests) == 2
    assert (await client.training.get_dataset("b")).name == "b"
    await client.training.delete_dataset("b")
    with pytest.raises(NotFound):
        await client.training.get_dataset("b")


async def test_a_dataset_that_a_job_needs_is_not_deleted(
    client: GatewayClient, training: FakeTraining
) -> None:
    training.in_use.add("data")
    with pytest.raises(FailedPrecondition) as raised:
        await client.training.delete_dataset("data")
    assert raised.value.reason == ErrorReason.ERROR_REASON_DATASET_IN_USE


# --- specs


async def test_keywords_land_in_their_messages(
    client: GatewayClient, training: FakeTraining
) -> None:
    job = await client.training.create_job(
        job_id="mine",
        labels={"team": "search"},
        priority=-7,
        request_id="once",
        dataset="data",
        adapter="support",
        backend=Backend.BACKEND_PEFT,
        epochs=1,
        learning_rate=1e-4,
        seed=0,
        fit_micro_batch=False,
        quantization=Quantization.QUANTIZATION_NONE,
        r=16,
        target_modules=["q_proj"],
        eval_fraction=0,
        traffic_percent=0,
        gate=GateSpec(max_eval_loss=2),
        cancel_grace_s=1.5,
        checkpoint_interval_s=90,
        max_attempts=5,
        alpha=None,
    )
    assert (job.name, dict(job.labels), job.priority) == ("mine", {"team": "search"}, -7)
    assert training.requests == [
        pb.CreateJobRequest(
            request_id="once",
            job_id="mine",
            labels={"team": "search"},
            priority=-7,
            spec=JobSpec(
                dataset="data",
                adapter="support",
                backend=Backend.BACKEND_PEFT,
                hyperparameters=Hyperparameters(
                    epochs=1,
                    learning_rate=1e-4,
                    seed=0,
                    fit_micro_batch=False,
                    quantization=Quantization.QUANTIZATION_NONE,
                ),
                lora=LoraSpec(r=16, target_modules=["q_proj"]),
                data=DataSpec(eval_fraction=0),
                publish=PublishSpec(traffic_percent=0, gate=GateSpec(max_eval_loss=2)),
                cancel_grace=Duration(seconds=1, nanos=500_000_000),
                checkpoint_interval=Duration(seconds=90),
                max_attempts=5,
            ),
        )
    ]


async def test_a_job_without_traffic_or_gate_does_not_publish(
    client: GatewayClient, training: FakeTraining
) -> None:
    await client.training.create_job(dataset="data", adapter="support", target_modules="q_proj")
    (request,) = training.requests
    assert isinstance(request, pb.CreateJobRequest)
    assert not request.spec.HasField("publish")
    assert not request.spec.HasField("hyperparameters")
    assert request.spec.lora.target_modules == ["q_proj"]


@pytest.mark.parametrize(
    ("keywords", "kind", "text"),
    [
        ({}, TypeError, "say what to train"),
        ({"spec": JobSpec(), "r": 8}, TypeError, "not both"),
        ({"dataset": "data", "rank": 8}, TypeError, "no field of a job's spec: rank"),
        ({"dataset": "data", "lora": LoraSpec()}, TypeError, "no field of a job's spec: lora"),
        ({"dataset": "data", "r": -1}, ValueError, "out of range"),
        ({"dataset": "data", "r": "eight"}, TypeError, "eight|str"),
    ],
)
async def test_what_fits_into_no_spec_is_refused_unsent(
    client: GatewayClient,
    training: FakeTraining,
    keywords: dict[str, Any],
    kind: type[Exception],
    text: str,
) -> None:
    with pytest.raises(kind, match=text):
        await client.training.create_job(**keywords)
    assert not training.requests


def test_every_field_of_a_spec_is_a_keyword() -> None:
    sections = {"hyperparameters", "lora", "data", "publish"}
    fields = {name for name in JobSpec.DESCRIPTOR.fields_by_name if name not in sections}
    durations = {"cancel_grace", "checkpoint_interval"}
    for section in (Hyperparameters, LoraSpec, DataSpec, PublishSpec):
        fields |= set(section.DESCRIPTOR.fields_by_name)
    assert set(JobKeywords.__annotations__) == fields - durations | {
        f"{name}_s" for name in durations
    }


# --- jobs


async def test_creating_again_after_unavailable_makes_one_job(
    client: GatewayClient, training: FakeTraining
) -> None:
    training.failures.extend([UNAVAILABLE, UNAVAILABLE])
    spec = JobSpec(dataset="data", adapter="support")
    job = await client.training.create_job(spec)
    assert list(training.jobs) == [job.name]
    ids = {request.request_id for request in training.requests}  # type: ignore[attr-defined]
    assert len(training.requests) == 3
    assert len(ids) == 1
    assert all(ids)
    # Another call is another job.
    assert (await client.training.create_job(spec)).name != job.name


async def test_a_request_id_of_ones_own_makes_one_job(client: GatewayClient) -> None:
    spec = JobSpec(dataset="data", adapter="support")
    first = await client.training.create_job(spec, request_id="once")
    assert (await client.training.create_job(spec, request_id="once")).name == first.name


async def test_validate_only_creates_nothing(client: GatewayClient, training: FakeTraining) -> None:
    job = await client.training.create_job(dataset="data", adapter="support", validate_only=True)
    assert job.spec.adapter == "support"
    assert not training.jobs


async def test_an_estimate_takes_the_same_spec(
    client: GatewayClient, training: FakeTraining
) -> None:
    estimate = await client.training.estimate_job(
        priority=2, dataset="data", adapter="support", r=8
    )
    assert estimate == training.estimate
    spec = JobSpec(dataset="data", adapter="support", lora=LoraSpec(r=8))
    assert training.requests == [pb.EstimateJobRequest(spec=spec, priority=2)]


async def test_jobs_are_listed_page_by_page_newest_first(
    client: GatewayClient, training: FakeTraining
) -> None:
    for number in range(3):
        await training.add_job(f"run-{number}")
    await training.tell("run-1", *states("RUNNING"))
    other = JobSpec(dataset="data", adapter="other")
    await training.add_job("other-1", other)

    async def names(**arguments: Any) -> list[str]:
        return [job.name async for job in client.training.list_jobs(**arguments)]

    assert await names(page_size=3) == ["other-1", "run-2", "run-1", "run-0"]
    assert await names(adapter="support") == ["run-2", "run-1", "run-0"]
    assert await names(states=[JobState.JOB_STATE_RUNNING]) == ["run-1"]


async def test_a_job_is_paused_and_resumed(client: GatewayClient, training: FakeTraining) -> None:
    await training.add_job("run")
    assert (await client.training.pause_job("run")).state == JobState.JOB_STATE_PAUSING
    assert training.requests[-1] == pb.PauseJobRequest(name="run")
    await training.tell("run", *states("PAUSED"))
    assert (await client.training.resume_job("run")).state == JobState.JOB_STATE_QUEUED
    assert training.requests[-1] == pb.ResumeJobRequest(name="run")
    await training.tell("run", *states("SUCCEEDED"))
    for call, reason in [
        (client.training.pause_job, ErrorReason.ERROR_REASON_JOB_NOT_PAUSABLE),
        (client.training.resume_job, ErrorReason.ERROR_REASON_JOB_NOT_RESUMABLE),
    ]:
        with pytest.raises(FailedPrecondition) as raised:
            await call("run")
        assert raised.value.reason == reason


async def test_a_job_is_cancelled_and_deleted(
    client: GatewayClient, training: FakeTraining
) -> None:
    await training.add_job("run")
    with pytest.raises(FailedPrecondition) as raised:
        await client.training.delete_job("run")
    assert raised.value.reason == ErrorReason.ERROR_REASON_JOB_ACTIVE
    job = await client.training.cancel_job("run", discard=True)
    assert job.state == JobState.JOB_STATE_CANCELLING
    assert training.requests[-1] == pb.CancelJobRequest(name="run", discard=True)
    await training.tell("run", *states("CANCELLED"))
    await client.training.delete_job("run")
    with pytest.raises(NotFound) as missing:
        await client.training.get_job("run")
    assert missing.value.reason == ErrorReason.ERROR_REASON_JOB_NOT_FOUND


async def test_deleting_is_not_tried_again(client: GatewayClient, training: FakeTraining) -> None:
    # The second try would find nothing, and hide that the first one worked.
    await training.add_job("run")
    training.failures.extend([UNAVAILABLE, UNAVAILABLE])
    with pytest.raises(Unavailable):
        await client.training.delete_job("run")
    with pytest.raises(Unavailable):
        await client.training.delete_dataset("data")
    assert len(training.requests) == 2


async def test_a_checkpoint_is_listed_and_published(
    client: GatewayClient, training: FakeTraining
) -> None:
    await training.add_job("run")
    await training.tell("run", pb.Checkpoint(step=5), pb.Checkpoint(step=10))
    checkpoints = await client.training.list_checkpoints("run")
    assert [checkpoint.step for checkpoint in checkpoints] == [10, 5]
    publish = PublishSpec(traffic_percent=10)
    publication = await client.training.publish_checkpoint(
        "run", step=5, adapter="other", publish=publish
    )
    assert publication.state == PublicationState.PUBLICATION_STATE_SERVING
    assert (publication.adapter, publication.version) == ("other", 7)
    assert training.requests[-1] == pb.PublishCheckpointRequest(
        name="run", step=5, adapter="other", publish=publish
    )
    with pytest.raises(NotFound) as raised:
        await client.training.publish_checkpoint("run", step=0)
    assert raised.value.reason == ErrorReason.ERROR_REASON_CHECKPOINT_NOT_FOUND


async def test_capabilities_come_as_they_are(client: GatewayClient, training: FakeTraining) -> None:
    assert await client.training.capabilities() == training.capabilities


# --- deadlines, errors


async def test_each_call_has_the_timeout_of_its_kind(training: FakeTraining) -> None:
    async def was(timeout_s: float) -> None:
        assert training.time_remaining_s == pytest.approx(timeout_s, abs=SLACK_S)

    await training.add_job("run")
    await training.tell("run", pb.Checkpoint(step=5))
    spec = JobSpec(dataset="data", adapter="support")
    async with (
        served(training) as target,
        GatewayClient(
            target,
            default_timeout_s=100,
            default_stream_timeout_s=200,
            default_job_timeout_s=400,
        ) as client,
    ):
        await client.training.create_job(spec)
        await was(100)
        await client.training.get_job("run")
        await was(100)
        await client.training.preview_tokens("data", 1)
        await was(200)
        await client.training.validate_dataset("data")
        await was(400)
        await client.training.estimate_job(spec)
        await was(400)
        await client.training.publish_checkpoint("run")
        await was(400)
        await client.training.upload_dataset(b"{}")
        await was(400)
        await client.training.validate_dataset("data", timeout_s=50)
        await was(50)


@pytest.mark.parametrize(
    ("code", "reason", "kind"),
    [
        (grpc.StatusCode.INVALID_ARGUMENT, "UNSERVABLE_ADAPTER", InvalidRequest),
        (grpc.StatusCode.INVALID_ARGUMENT, "BASE_MODEL_UNKNOWN", InvalidRequest),
        (grpc.StatusCode.NOT_FOUND, "DATASET_NOT_FOUND", NotFound),
        (grpc.StatusCode.FAILED_PRECONDITION, "TRAINING_UNAVAILABLE", FailedPrecondition),
        (grpc.StatusCode.ALREADY_EXISTS, "JOB_EXISTS", GatewayError),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL", Overloaded),
    ],
)
async def test_reasons_of_training_have_their_classes(
    client: GatewayClient,
    training: FakeTraining,
    code: grpc.StatusCode,
    reason: str,
    kind: type[GatewayError],
) -> None:
    training.failures.append(refusal(code, reason, "no", job="run"))
    with pytest.raises(GatewayError) as raised:
        await client.training.create_job(dataset="data", adapter="support")
    assert type(raised.value) is kind
    assert raised.value.reason == ErrorReason.Value(f"ERROR_REASON_{reason}")
    assert raised.value.metadata["job"] == "run"


async def test_calls_run_side_by_side(client: GatewayClient, training: FakeTraining) -> None:
    await training.add_job("run")
    jobs = await asyncio.gather(*(client.training.get_job("run") for _ in range(20)))
    assert {job.name for job in jobs} == {"run"}
