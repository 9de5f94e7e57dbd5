"""PauseJob and ResumeJob over a real store."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from engine.models import resolve_model
from lora_gateway.v1 import training_pb2 as pb
from lora_gateway.v1.training_pb2_grpc import TrainingStub
from tests.gateway.control_plane import control_plane
from tests.gateway.promises import refused
from tests.gateway.training_calls import BASE, spec, upload


async def test_a_job_is_paused_and_resumed_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = resolve_model("tiny", tmp_path / "models")
    async with control_plane(
        tmp_path, monkeypatch, model=model, modules=BASE, training_devices=["cpu"]
    ) as plane:
        stub: Any = TrainingStub(plane.gateway.channel)
        await upload(stub)
        request = pb.CreateJobRequest(job_id="night", spec=spec())
        assert (await stub.CreateJob(request)).job.attempts_left == 3
        for _ in range(2):  # nothing runs jobs here, so it waits for its dataset to be read
            job = (await stub.PauseJob(pb.PauseJobRequest(name="night"))).job
            assert job.state == pb.JOB_STATE_VALIDATING
        for _ in range(2):
            job = (await stub.ResumeJob(pb.ResumeJobRequest(name="night"))).job
            assert job.state == pb.JOB_STATE_VALIDATING
        await stub.CancelJob(pb.CancelJobRequest(name="night"))
        refusal = await refused(stub.PauseJob(pb.PauseJobRequest(name="night")))
        assert refusal.reason == "JOB_NOT_PAUSABLE"
        assert refusal.metadata["job"] == "night"
        refusal = await refused(stub.ResumeJob(pb.ResumeJobRequest(name="night")))
        assert refusal.reason == "JOB_NOT_RESUMABLE"
        for call in (stub.PauseJob, stub.ResumeJob):
            kind = pb.PauseJobRequest if call is stub.PauseJob else pb.ResumeJobRequest
            assert (await refused(call(kind(name="none")))).reason == "JOB_NOT_FOUND"
            assert (await refused(call(kind()))).reason == "INVALID_FIELD"
