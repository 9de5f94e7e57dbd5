"""Lists of datasets and jobs come page by page, whatever is deleted meanwhile."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from engine.models import resolve_model
from lora_gateway.v1 import training_pb2 as pb
from lora_gateway.v1.training_pb2_grpc import TrainingStub
from tests.gateway.control_plane import control_plane
from tests.gateway.promises import refused
from tests.gateway.training_calls import BASE, spec, upload


@pytest_asyncio.fixture
async def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Any]:
    model = resolve_model("tiny", tmp_path / "models")
    async with control_plane(
        tmp_path, monkeypatch, model=model, modules=BASE, training_devices=["cpu"]
    ) as plane:
        yield TrainingStub(plane.gateway.channel)


async def test_jobs_come_page_by_page_also_where_some_are_deleted_meanwhile(stub: Any) -> None:
    await upload(stub)
    for name in ("a", "b", "c", "d"):
        await stub.CreateJob(pb.CreateJobRequest(job_id=name, spec=spec()))
        await stub.CancelJob(pb.CancelJobRequest(name=name, discard=True))
        async for _ in stub.WatchJob(pb.WatchJobRequest(name=name)):
            pass  # until it has ended
    page = await stub.ListJobs(pb.ListJobsRequest(page_size=2))
    assert [job.name for job in page.jobs] == ["d", "c"]
    await stub.DeleteJob(pb.DeleteJobRequest(name="c"))
    request = pb.ListJobsRequest(page_size=2, page_token=page.next_page_token)
    page = await stub.ListJobs(request)
    assert [job.name for job in page.jobs] == ["b", "a"] and not page.next_page_token
    refusal = await refused(stub.ListJobs(pb.ListJobsRequest(page_token="nobody")))
    assert (refusal.reason, refusal.fields) == ("INVALID_FIELD", ["page_token"])


async def test_datasets_go_on_where_the_last_of_a_page_was_deleted(stub: Any) -> None:
    for name in ("a", "b", "c"):
        await upload(stub, dataset=name, upload_id=f"up-{name}")
    page = await stub.ListDatasets(pb.ListDatasetsRequest(page_size=2))
    await stub.DeleteDataset(pb.DeleteDatasetRequest(name="b"))
    request = pb.ListDatasetsRequest(page_token=page.next_page_token)
    assert [each.name for each in (await stub.ListDatasets(request)).datasets] == ["c"]
    refusal = await refused(stub.ListDatasets(pb.ListDatasetsRequest(page_token="No Name")))
    assert (refusal.reason, refusal.fields) == ("INVALID_FIELD", ["page_token"])
