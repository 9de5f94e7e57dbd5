"""What a job may begin with, as callers of the Training service name it."""

from __future__ import annotations

import hashlib
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from engine.errors import InvalidRequest
from engine.models import resolve_model
from gateway.spec_codec import decode_spec
from lora_gateway.v1 import adapters_pb2 as ad
from lora_gateway.v1 import training_pb2 as pb
from lora_gateway.v1.training_pb2_grpc import TrainingStub
from store.artifacts import CONFIG_FILE, WEIGHTS_FILE
from tests.gateway.control_plane import Plane, control_plane
from tests.gateway.promises import refused
from tests.gateway.training_calls import BASE, spec, upload
from tests.trainer.small_adapter import config_of, write_tensors

TARGETS = ("q_proj", "v_proj")
RANK = 8
TENSORS = {
    f"base_model.model.{module}.lora_{side}.weight": shape
    for module, (rows, columns) in BASE.linear.items()
    if module.rpartition(".")[2] in TARGETS
    for side, shape in (("A", [RANK, columns]), ("B", [rows, RANK]))
}


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


@pytest_asyncio.fixture(loop_scope="session")
async def stub(plane: Plane) -> Any:
    stub = TrainingStub(plane.gateway.channel)
    await upload(stub)
    return stub


async def version(plane: Plane, seed: int, **fields: Any) -> ad.AdapterVersion:
    """The next version of `sql`, READY."""
    folder = plane.sources / f"s{seed}"
    folder.mkdir()
    (folder / CONFIG_FILE).write_text(config_of(TARGETS, RANK))
    write_tensors(folder / WEIGHTS_FILE, TENSORS, seed)
    request = ad.CreateAdapterVersionRequest(
        adapter="sql", source_uri=str(folder), wait=True, **fields
    )
    made: ad.AdapterVersion = (await plane.stub.CreateAdapterVersion(request)).adapter_version
    assert made.state == ad.VERSION_STATE_READY
    return made


def named(number: int | None = None, adapter: str = "sql") -> pb.InitFrom:
    return pb.InitFrom(adapter_version=pb.AdapterVersionSource(adapter=adapter, version=number))


async def draft(stub: Any, init_from: pb.InitFrom, **fields: Any) -> pb.Job:
    request = pb.CreateJobRequest(spec=spec(init_from=init_from, **fields), validate_only=True)
    return (await stub.CreateJob(request)).job  # type: ignore[no-any-return]


async def split(plane: Plane, **weights: int) -> None:
    splits = [
        ad.TrafficSplit(version=int(name.removeprefix("v")), weight=weight)
        for name, weight in weights.items()
    ]
    await plane.stub.SetTraffic(ad.SetTrafficRequest(adapter="sql", splits=splits))


async def test_a_draft_names_the_version_with_the_most_traffic(plane: Plane, stub: Any) -> None:
    made = [await version(plane, seed) for seed in (1, 2, 3)]
    await split(plane, v1=1, v2=3, v3=2)
    found = await draft(stub, named())
    assert found.spec.init_from == named(), "as it was asked for"
    expected = named(2)
    expected.weights_sha256 = made[1].weights_sha256
    assert found.effective_spec.init_from == expected
    lora = found.effective_spec.lora
    assert (lora.r, lora.alpha, lora.use_rslora) == (RANK, 16, True)
    assert (lora.dropout, tuple(lora.target_modules)) == (0.1, TARGETS)
    # Of several the newest, and any that is named.
    await split(plane, v1=3, v2=3, v3=1)
    assert (await draft(stub, named())).effective_spec.init_from == expected
    found = await draft(stub, named(3))
    assert found.effective_spec.init_from.adapter_version.version == 3
    # What was resolved can be asked for again.
    again = await draft(stub, expected, lora=found.effective_spec.lora)
    assert again.effective_spec.init_from == expected


async def test_what_is_not_there_or_not_ready_is_refused(plane: Plane, stub: Any) -> None:
    assert (await refused(draft(stub, named()))).reason == "ADAPTER_NOT_FOUND"
    await version(plane, 1)
    assert (await refused(draft(stub, named(7)))).reason == "VERSION_NOT_FOUND"
    await split(plane)
    refusal = await refused(draft(stub, named()))
    assert refusal.reason == "ADAPTER_NOT_READY"
    assert (await draft(stub, named(1))).effective_spec.init_from.adapter_version.version == 1
    await plane.stub.DeleteAdapterVersion(ad.DeleteAdapterVersionRequest(adapter="sql", version=1))
    await plane.until("sql", 1, ad.VERSION_STATE_DELETED)
    refusal = await refused(draft(stub, named(1)))
    assert refusal.reason == "ADAPTER_NOT_READY" and refusal.metadata["state"] == "DELETED"

    checkpoint = pb.InitFrom(checkpoint=pb.CheckpointSource(job="none"))
    assert (await refused(draft(stub, checkpoint))).reason == "JOB_NOT_FOUND"


async def test_what_cannot_be_trained_further_is_refused(plane: Plane, stub: Any) -> None:
    uri = plane.write_source("strange")  # whose weights are no tensors
    request = ad.CreateAdapterVersionRequest(adapter="sql", source_uri=uri, wait=True)
    await plane.stub.CreateAdapterVersion(request)
    refusal = await refused(draft(stub, named(1)))
    assert refusal.reason == "INIT_FROM_UNUSABLE"
    assert refusal.metadata == {"init_from": "sql@1"}
    await version(plane, 1)
    other = named(2)
    other.weights_sha256 = "0" * 64
    assert (await refused(draft(stub, other))).reason == "INIT_FROM_UNUSABLE"
    refusal = await refused(draft(stub, named(2), lora=pb.LoraSpec(r=16, alpha=8)))
    assert refusal.reason == "INVALID_FIELD"
    assert refusal.fields == ["spec.lora.r", "spec.lora.alpha"]


@pytest.mark.parametrize(
    ("init_from", "field"),
    [
        (pb.InitFrom(), "spec.init_from"),
        (pb.InitFrom(weights_sha256="0" * 64), "spec.init_from"),
        (named(adapter="UPPER"), "spec.init_from.adapter_version.adapter"),
        (named(adapter=""), "spec.init_from.adapter_version.adapter"),
        (named(0), "spec.init_from.adapter_version.version"),
        (
            pb.InitFrom(checkpoint=pb.CheckpointSource(job="a/b")),
            "spec.init_from.checkpoint.job",
        ),
        (
            pb.InitFrom(checkpoint=pb.CheckpointSource(job="one", step=0)),
            "spec.init_from.checkpoint.step",
        ),
        (
            pb.InitFrom(checkpoint=pb.CheckpointSource(job="one"), weights_sha256="A" * 64),
            "spec.init_from.weights_sha256",
        ),
    ],
)
def test_fields_that_cannot_be_are_named(init_from: pb.InitFrom, field: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        decode_spec(spec(init_from=init_from))
    assert [violation.field for violation in refused.value.violations] == [field]


async def test_the_weights_are_kept_with_the_job_when_the_version_goes(
    plane: Plane, stub: Any, tmp_path: Path
) -> None:
    made = await version(plane, 1)
    request = pb.CreateJobRequest(job_id="on", spec=spec(init_from=named(1)))
    job = (await stub.CreateJob(request)).job
    await stub.CancelJob(pb.CancelJobRequest(name="on"))
    await split(plane)
    await plane.stub.DeleteAdapterVersion(ad.DeleteAdapterVersionRequest(adapter="sql", version=1))
    await plane.until("sql", 1, ad.VERSION_STATE_DELETED)
    assert not list((tmp_path / "state" / "adapters").iterdir())
    [held] = (tmp_path / "state" / "jobs").glob(f"*/initial/{WEIGHTS_FILE}")
    assert hashlib.sha256(held.read_bytes()).hexdigest() == made.weights_sha256
    assert job.effective_spec.init_from.weights_sha256 == made.weights_sha256
    assert re.fullmatch(r"[0-9a-f]{32}", held.parents[1].name)
