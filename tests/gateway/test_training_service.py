"""The Training service over a real store, real datasets and the real tokenizer."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio

from engine.models import resolve_model
from lora_gateway.v1 import training_pb2 as pb
from lora_gateway.v1.training_pb2_grpc import TrainingStub
from tests.gateway.control_plane import Plane, control_plane
from tests.gateway.promises import refused
from tests.gateway.training_calls import BASE, CONTENT, MODULES, header, sent, spec, upload


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return resolve_model("tiny", tmp_path_factory.mktemp("models"))


@pytest_asyncio.fixture(loop_scope="session")
async def plane(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: Path
) -> AsyncIterator[Plane]:
    async with control_plane(
        tmp_path, monkeypatch, model=model, modules=BASE, training_devices=["cpu"]
    ) as plane:
        yield plane


@pytest.fixture
def stub(plane: Plane) -> Any:
    return TrainingStub(plane.gateway.channel)


# --- datasets ----------------------------------------------------------------


async def test_an_uploaded_dataset_is_listed_told_and_deleted(stub: Any) -> None:
    dataset = await upload(stub)
    assert (dataset.name, dataset.sha256, dataset.size_bytes) == (
        "faq",
        hashlib.sha256(CONTENT).hexdigest(),
        len(CONTENT),
    )
    assert dataset.create_time.seconds
    assert (await stub.GetDataset(pb.GetDatasetRequest(name="faq"))).dataset == dataset
    await upload(stub, b"{}\n", upload_id="up-2", dataset="zoo")
    page = await stub.ListDatasets(pb.ListDatasetsRequest(page_size=1))
    assert [each.name for each in page.datasets] == ["faq"] and page.next_page_token == "faq"
    page = await stub.ListDatasets(pb.ListDatasetsRequest(page_token=page.next_page_token))
    assert [each.name for each in page.datasets] == ["zoo"] and not page.next_page_token
    await stub.DeleteDataset(pb.DeleteDatasetRequest(name="faq"))
    refusal = await refused(stub.GetDataset(pb.GetDatasetRequest(name="faq")))
    assert refusal.reason == "DATASET_NOT_FOUND"


async def test_an_upload_that_broke_off_goes_on_and_is_answered_again(stub: Any) -> None:
    content = CONTENT * 100
    head = header(content)
    half = list(sent(head, content))[:6]
    refusal = await refused(stub.UploadDataset(iter(half)))
    assert refusal.reason == "UPLOAD_INCOMPLETE"
    stands = await stub.QueryUpload(pb.TrainingQueryUploadRequest(upload_id="up-1"))
    assert (stands.offset, stands.size_bytes) == (5000, len(content))
    assert stands.expire_time.seconds
    answer = await stub.UploadDataset(sent(head, content, offset=5000))
    assert answer.dataset.size_bytes == len(content)
    # The same again needs no byte; and the upload is forgotten.
    again = await stub.UploadDataset(iter([pb.UploadDatasetRequest(header=head)]))
    assert again.dataset == answer.dataset
    request = pb.TrainingQueryUploadRequest(upload_id="up-1")
    assert (await refused(stub.QueryUpload(request))).reason == "UPLOAD_NOT_FOUND"


async def test_a_dataset_never_changes(stub: Any) -> None:
    await upload(stub)
    other = CONTENT * 2
    refusal = await refused(stub.UploadDataset(sent(header(other, upload_id="up-2"), other)))
    assert refusal.reason == "DATASET_EXISTS" and refusal.metadata == {"dataset": "faq"}


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"dataset": "Not A Name"}, "header.dataset"),
        ({"upload_id": "../up"}, "header.upload_id"),
        ({"size_bytes": 0}, "header.size_bytes"),
        ({"size_bytes": 5 << 40}, "header.size_bytes"),
        ({"sha256": "XYZ"}, "header.sha256"),
        ({"format": 77}, "header.format"),
    ],
)
async def test_a_header_that_cannot_be_names_its_field(
    stub: Any, fields: dict[str, Any], field: str
) -> None:
    refusal = await refused(stub.UploadDataset(sent(header(**fields))))
    assert (refusal.reason, refusal.fields) == ("INVALID_FIELD", [field])


async def test_other_bytes_than_announced_are_refused(stub: Any) -> None:
    refusal = await refused(stub.UploadDataset(sent(header(sha256="0" * 64))))
    assert refusal.reason == "CHECKSUM_MISMATCH"


async def test_a_report_names_every_bad_line_and_counts_tokens(stub: Any) -> None:
    bad = b'{"messages": [{"role": "wizard", "content": "x"}]}\n'
    await upload(stub, CONTENT * 30 + bad)
    request = pb.ValidateDatasetRequest(dataset="faq")
    report = (await stub.ValidateDataset(request)).report
    assert (report.valid, report.total_lines, report.bad_lines, report.rows) == (True, 31, 1, 30)
    (issue,) = report.issues
    assert (issue.line, issue.field) == (31, "messages[0].role")
    assert issue.code == pb.LINE_ISSUE_CODE_WRONG_ROLE
    assert report.format == pb.DATASET_FORMAT_CHAT
    assert report.duplicate_rows == 29 and list(report.duplicate_lines) == list(range(2, 31))
    assert 0 < report.tokens.trained < report.tokens.total
    assert sum(bucket.rows for bucket in report.tokens.histogram) == 30
    # The policy is the caller's.
    request.data.max_bad_ratio = 0.0
    report = (await stub.ValidateDataset(request)).report
    assert not report.valid and report.reasons
    # As often as it is asked, from a file.
    assert (await stub.ValidateDataset(request)).report == report
    request.max_issues = 0
    assert (await refused(stub.ValidateDataset(request))).fields == ["max_issues"]


async def test_a_preview_shows_what_is_trained_on(stub: Any) -> None:
    await upload(stub, CONTENT + b"{\n")
    shown = await stub.PreviewTokens(pb.PreviewTokensRequest(dataset="faq", line=1))
    assert shown.kept and not shown.reason
    assert "Old Marta does." in shown.text
    trained = "".join(token.text for token in shown.tokens if token.trained)
    assert trained.startswith("Old Marta does.") and "Who" not in trained
    # The fake shard is no tokenizer, so it does not agree, and is said to differ.
    assert not shown.matches_serving and "assistant turn 1" in shown.mismatch
    shown = await stub.PreviewTokens(pb.PreviewTokensRequest(dataset="faq", line=2))
    assert not shown.kept and shown.reason
    assert not shown.matches_serving and "nothing was compared" in shown.mismatch
    for line in (0, 9):
        request = pb.PreviewTokensRequest(dataset="faq", line=line)
        assert (await refused(stub.PreviewTokens(request))).fields == ["line"]


# --- jobs --------------------------------------------------------------------


async def test_a_gateway_that_trains_nothing_says_so_and_reads_datasets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: Path
) -> None:
    async with control_plane(
        tmp_path, monkeypatch, model=model, training_devices=["none"]
    ) as plane:
        stub: Any = TrainingStub(plane.gateway.channel)
        assert not (await stub.GetCapabilities(pb.GetCapabilitiesRequest())).devices
        await upload(stub, CONTENT * 20)
        assert (await stub.ValidateDataset(pb.ValidateDatasetRequest(dataset="faq"))).report.valid
        spec = pb.JobSpec(dataset="faq", adapter="marta")
        refusal = await refused(stub.CreateJob(pb.CreateJobRequest(spec=spec)))
        assert refusal.reason == "TRAINING_UNAVAILABLE"
        assert "--training-devices" in refusal.message


@pytest.mark.parametrize(
    ("data", "reason", "field"),
    [
        (pb.DataSpec(max_sequence_tokens=9999), "UNSERVABLE_ADAPTER", "max_sequence_tokens"),
        (pb.DataSpec(max_row_tokens=9999), "INVALID_FIELD", "max_row_tokens"),
        (pb.DataSpec(reserve_tokens=2048), "INVALID_FIELD", "reserve_tokens"),
    ],
)
async def test_what_no_job_would_take_is_neither_validated_nor_shown(
    stub: Any, data: pb.DataSpec, reason: str, field: str
) -> None:
    await upload(stub)
    validate = pb.ValidateDatasetRequest(dataset="faq", data=data)
    preview = pb.PreviewTokensRequest(dataset="faq", line=1, data=data)
    for refusal in (
        await refused(stub.ValidateDataset(validate)),
        await refused(stub.PreviewTokens(preview)),
    ):
        assert (refusal.reason, refusal.fields) == (reason, [f"data.{field}"])
    refusal = await refused(stub.CreateJob(pb.CreateJobRequest(spec=spec(data=data))))
    assert (refusal.reason, refusal.fields) == (reason, [f"spec.data.{field}"])


def prepared_rows(folder: Path) -> list[Path]:
    return list(folder.rglob("rows.parquet"))


async def test_a_deleted_dataset_takes_its_rows_along(stub: Any, tmp_path: Path) -> None:
    await upload(stub)
    await stub.ValidateDataset(pb.ValidateDatasetRequest(dataset="faq"))
    assert len(prepared_rows(tmp_path)) == 1
    await stub.DeleteDataset(pb.DeleteDatasetRequest(name="faq"))
    assert prepared_rows(tmp_path) == []


async def test_all_that_is_wrong_with_a_spec_comes_at_once(stub: Any) -> None:
    request = pb.CreateJobRequest(
        job_id="Not A Name",
        priority=11,
        spec=pb.JobSpec(
            adapter="UPPER",
            hyperparameters=pb.Hyperparameters(epochs=0, learning_rate=7, optimizer=9),  # type: ignore[arg-type]
            lora=pb.LoraSpec(dropout=1.0, target_modules=["m"] * 20_000),
            data=pb.DataSpec(eval_fraction=0.9),
        ),
    )
    refusal = await refused(stub.CreateJob(request))
    assert refusal.reason == "INVALID_FIELD"
    assert set(refusal.fields) == {
        "job_id",
        "priority",
        "spec.adapter",
        "spec.dataset",
        "spec.hyperparameters.epochs",
        "spec.hyperparameters.learning_rate",
        "spec.hyperparameters.optimizer",
        "spec.lora.dropout",
        "spec.lora.target_modules",
        "spec.data.eval_fraction",
    }


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"lora": pb.LoraSpec(r=64)}, "spec.lora.r"),
        ({"lora": pb.LoraSpec(target_modules=["lm_head"])}, "spec.lora.target_modules"),
        ({"lora": pb.LoraSpec(target_modules=["a.q_proj"])}, "spec.lora.target_modules"),
        ({"lora": pb.LoraSpec(target_modules=["embed_tokens"])}, "spec.lora.target_modules"),
        ({"lora": pb.LoraSpec(bias="all")}, "spec.lora.bias"),
        ({"data": pb.DataSpec(max_sequence_tokens=9999)}, "spec.data.max_sequence_tokens"),
    ],
)
async def test_what_could_not_be_served_is_refused_before_anything_is_spent(
    stub: Any, fields: dict[str, Any], field: str
) -> None:
    await upload(stub)
    refusal = await refused(stub.CreateJob(pb.CreateJobRequest(spec=spec(**fields))))
    assert refusal.reason == "UNSERVABLE_ADAPTER"
    assert refusal.fields == [field] and refusal.metadata["field"] == field
    assert not (await stub.ListJobs(pb.ListJobsRequest())).jobs


async def test_a_job_needs_its_dataset_and_the_served_model(stub: Any) -> None:
    refusal = await refused(stub.CreateJob(pb.CreateJobRequest(spec=spec())))
    assert refusal.reason == "DATASET_NOT_FOUND"
    await upload(stub)
    request = pb.CreateJobRequest(spec=spec(base_model="other"))
    refusal = await refused(stub.CreateJob(request))
    assert refusal.reason == "BASE_MODEL_UNKNOWN" and refusal.fields == ["spec.base_model"]


async def test_a_draft_tells_what_would_be_used_and_keeps_nothing(stub: Any) -> None:
    await upload(stub)
    request = pb.CreateJobRequest(spec=spec(), validate_only=True, priority=3)
    draft = (await stub.CreateJob(request)).job
    assert draft.priority == 3
    assert draft.state == pb.JOB_STATE_UNSPECIFIED
    assert draft.publication.state == pb.PUBLICATION_STATE_NOT_REQUESTED
    assert draft.publication.adapter == "support"
    effective = draft.effective_spec
    assert (effective.lora.r, effective.lora.alpha, effective.lora.use_rslora) == (32, 64, True)
    asked = effective.hyperparameters
    assert (asked.epochs, asked.learning_rate, asked.seed) == (3, 2e-4, 3407)
    assert (asked.micro_batch_size, asked.gradient_accumulation) == (2, 4)
    assert asked.max_grad_norm == 0.3 and asked.weight_decay == 0.01
    assert asked.quantization == pb.QUANTIZATION_NF4
    assert effective.data.max_row_tokens == 1800 and effective.data.reserve_tokens == 50
    assert effective.cancel_grace.seconds == 10
    assert (effective.checkpoint_interval.seconds, effective.max_attempts) == (600, 3)
    request.spec.publish.SetInParent()
    draft = (await stub.CreateJob(request)).job
    assert draft.publication.state == pb.PUBLICATION_STATE_PENDING
    assert not (await stub.ListJobs(pb.ListJobsRequest())).jobs


async def test_a_job_is_made_once_by_a_request_and_ends_when_it_is_cancelled(stub: Any) -> None:
    await upload(stub)
    request = pb.CreateJobRequest(request_id="r-1", job_id="night", spec=spec())
    request.labels["team"] = "blue"
    request.priority = -10
    job = (await stub.CreateJob(request)).job
    assert job.priority == -10
    assert (job.name, job.state) == ("night", pb.JOB_STATE_VALIDATING)
    assert job.publication.state == pb.PUBLICATION_STATE_NOT_REQUESTED
    assert (await stub.CreateJob(request)).job.name == "night"
    request.priority = 10
    assert (await refused(stub.CreateJob(request))).reason == "REQUEST_ID_REUSED"
    request.priority = -10
    request.spec.hyperparameters.epochs = 9
    assert (await refused(stub.CreateJob(request))).reason == "REQUEST_ID_REUSED"
    request.request_id = "r-2"
    assert (await refused(stub.CreateJob(request))).reason == "JOB_EXISTS"

    refusal = await refused(stub.DeleteDataset(pb.DeleteDatasetRequest(name="faq")))
    assert (refusal.reason, refusal.metadata["job"]) == ("DATASET_IN_USE", "night")
    refusal = await refused(stub.DeleteJob(pb.DeleteJobRequest(name="night")))
    assert refusal.reason == "JOB_ACTIVE"

    await stub.CancelJob(pb.CancelJobRequest(name="night", discard=True))
    seen = []
    async for message in stub.WatchJob(pb.WatchJobRequest(name="night")):
        seen.append(message.event)
    assert [event.sequence for event in seen] == list(range(1, len(seen) + 1))
    assert seen[-1].state_changed.state == pb.JOB_STATE_CANCELLED
    job = (await stub.GetJob(pb.GetJobRequest(name="night"))).job
    assert job.state == pb.JOB_STATE_CANCELLED and dict(job.labels) == {"team": "blue"}
    assert job.end_time.seconds

    listed = await stub.ListJobs(pb.ListJobsRequest(states=[pb.JOB_STATE_CANCELLED]))
    assert [each.name for each in listed.jobs] == ["night"]
    listed = await stub.ListJobs(pb.ListJobsRequest(adapter="other"))
    assert not listed.jobs
    assert not (await stub.ListCheckpoints(pb.ListCheckpointsRequest(name="night"))).checkpoints
    refusal = await refused(stub.PublishCheckpoint(pb.PublishCheckpointRequest(name="night")))
    assert refusal.reason == "CHECKPOINT_NOT_FOUND"
    watch = pb.WatchJobRequest(name="night", after_sequence=999)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in stub.WatchJob(watch):
            pass
    assert caught.value.code() is grpc.StatusCode.OUT_OF_RANGE
    await stub.DeleteJob(pb.DeleteJobRequest(name="night"))
    assert (await refused(stub.GetJob(pb.GetJobRequest(name="night")))).reason == "JOB_NOT_FOUND"
    await stub.DeleteDataset(pb.DeleteDatasetRequest(name="faq"))


async def test_an_estimate_tells_tokens_steps_and_memory(stub: Any) -> None:
    await upload(stub, CONTENT * 40)
    estimate = (await stub.EstimateJob(pb.EstimateJobRequest(spec=spec()))).estimate
    assert (estimate.rows, estimate.steps) == (38, 15)  # two held out, eight a step, three times
    assert estimate.tokens and estimate.memory_bytes and estimate.memory_available_bytes
    assert estimate.adapter_bytes and round(estimate.lora_scale, 1) == 11.3
    assert not estimate.HasField("cost")
    assert estimate.queue_position == 0, "its device is free"
    request = pb.EstimateJobRequest(spec=spec(), priority=-11)
    assert (await refused(stub.EstimateJob(request))).fields == ["priority"]
    await upload(stub, b"[]\n" * 3, upload_id="up-2", dataset="bad")
    refusal = await refused(stub.EstimateJob(pb.EstimateJobRequest(spec=spec(dataset="bad"))))
    assert refusal.reason == "DATASET_INVALID"
    assert refusal.metadata == {"dataset": "bad", "total_lines": "3", "bad_lines": "3"}


async def test_pitfalls_capabilities_tell_what_is_trained_and_served(stub: Any) -> None:
    told = await stub.GetCapabilities(pb.GetCapabilitiesRequest())
    assert list(told.backends) == [pb.BACKEND_UNSLOTH, pb.BACKEND_PEFT]
    assert list(told.devices) == ["cpu"]
    assert (told.max_lora_rank, told.max_model_len) == (32, 2048)
    # Not the embeddings, of which an adapter is served, but not trained.
    assert set(told.target_modules) == {*MODULES, "gate_proj", "up_proj", "down_proj"}
    assert told.versions["unsloth"] and told.versions["peft"]
