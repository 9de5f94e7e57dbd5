"""What is refused before anything is spent, and what this gateway says that it can do."""

from __future__ import annotations

import asyncio
import json
import os
import stat
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from store.job_records import DatasetUnknown
from tests.trainer.job_stage import TENANT, Stage, stage
from trainer import devices
from trainer.capabilities import installed, installed_for
from trainer.devices import Device, cpu_computes_in_bfloat16, device_facts
from trainer.errors import (
    BaseModelUnknown,
    DatasetInvalid,
    InvalidSpec,
    TrainingUnavailable,
    UnservableAdapter,
)
from trainer.estimate import Price
from trainer.publisher import Finding
from trainer.spec import Backend, DataSpec, JobSpec, Precision

GPU_ANSWER = "81559, 70000, {capability}\n"


def spec(**changes: object) -> JobSpec:
    return JobSpec.model_validate({"dataset": "data", "adapter": "pirate", **changes})


async def test_a_spec_is_resolved_and_nothing_is_kept(tmp_path: Path) -> None:
    async with stage(tmp_path) as s:
        resolved = await s.jobs.check(TENANT, spec())
        assert resolved.backend is Backend.UNSLOTH
        assert resolved.base_model == "tiny"
        assert resolved.hyperparameters.fit_micro_batch is False, "it is a CPU"
        assert await s.store.active_jobs() == []


async def refusal(s: Stage, asked: JobSpec, kind: type[Exception]) -> str:
    """What `check` and `create` say, which is the same; nothing is kept."""
    with pytest.raises(kind) as checked:
        await s.jobs.check(TENANT, asked)
    with pytest.raises(kind) as created:
        await s.jobs.create(TENANT, asked)
    assert str(checked.value) == str(created.value)
    assert await s.store.active_jobs() == []
    return str(created.value)


async def test_what_cannot_be_trained_is_refused(tmp_path: Path) -> None:
    async with stage(tmp_path) as s:
        await refusal(s, spec(dataset="none"), DatasetUnknown)
        await refusal(s, spec(data=DataSpec(eval_dataset="none")), DatasetUnknown)
        said = await refusal(s, spec(base_model="other"), BaseModelUnknown)
        assert "'tiny'" in said
        said = await refusal(
            s, spec(data=DataSpec(max_sequence_tokens=100, max_row_tokens=101)), InvalidSpec
        )
        assert said.startswith("spec.data.max_row_tokens: is above max_sequence_tokens (100)")
        said = await refusal(
            s, spec(data=DataSpec(max_sequence_tokens=100, reserve_tokens=100)), InvalidSpec
        )
        assert said.startswith("spec.data.reserve_tokens")


async def test_what_could_not_be_served_is_refused_with_all_findings(tmp_path: Path) -> None:
    async with stage(tmp_path) as s:
        s.publisher.unservable = [Finding("spec.lora.r", "too large"), Finding("spec.lora", "no")]
        with pytest.raises(UnservableAdapter) as refused:
            await s.create("one")
        assert [finding.field for finding in refused.value.findings] == ["spec.lora.r", "spec.lora"]
        s.publisher.unservable = []
        said = await refusal(s, spec(data=DataSpec(max_sequence_tokens=4096)), UnservableAdapter)
        assert said.startswith("spec.data.max_sequence_tokens: rows of 4096 tokens")


async def test_without_a_device_nothing_is_trained(tmp_path: Path) -> None:
    async with stage(tmp_path, devices=[]) as s:
        said = await refusal(s, spec(), TrainingUnavailable)
        assert "no device" in said and "--training-devices" in said
        assert (await s.jobs.capabilities()).devices == ()


async def test_capabilities_tell_what_is_installed(tmp_path: Path) -> None:
    async with stage(tmp_path) as s:
        found = await s.jobs.capabilities()
    assert found.backends == (Backend.UNSLOTH, Backend.PEFT)
    assert found.devices == ("cpu",) and found.bfloat16 is cpu_computes_in_bfloat16()
    assert found.versions["peft"] and found.versions["torch"]


def python(folder: Path, text: str, name: str = "python") -> str:
    """An executable that takes the place of an interpreter or a tool."""
    path = folder / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


async def test_another_interpreter_is_asked_what_it_has(tmp_path: Path) -> None:
    root = str(Path(__file__).parents[2])
    environment = {"PATH": os.defpath, "PYTHONPATH": root}
    other = python(tmp_path, f'exec {sys.executable} "$@"')
    assert await installed_for(other, environment) == installed()


@pytest.mark.parametrize(
    ("text", "said"), [("echo broken >&2; exit 1", "broken"), ("echo '{}'", "does not answer")]
)
async def test_an_interpreter_that_cannot_train_is_named(
    tmp_path: Path, text: str, said: str
) -> None:
    with pytest.raises(TrainingUnavailable, match=said):
        await installed_for(python(tmp_path, text), {"PATH": os.defpath})
    with pytest.raises(TrainingUnavailable, match="does not start"):
        await installed_for(str(tmp_path / "nothing"), {})


def test_a_cpu_tells_its_memory() -> None:
    facts = device_facts(Device("cpu"))
    assert 2**28 < facts.memory_available_bytes <= facts.memory_bytes


@pytest.mark.parametrize(
    ("flags", "bfloat16"),
    [
        ("flags\t\t: fpu avx512_bf16 sse", True),
        ("Features\t: fp bf16", True),
        ("flags\t\t: fpu avx2", False),
        ("processor\t: 0", False),
    ],
)
async def test_pitfalls_a_cpu_without_bfloat16_trains_in_float32_and_all_say_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: str, bfloat16: bool
) -> None:
    (tmp_path / "cpuinfo").write_text(f"model name\t: a CPU\n{flags}\n")
    monkeypatch.setattr(devices, "CPU_INFO", tmp_path / "cpuinfo")
    assert device_facts(Device("cpu")).bfloat16 is bfloat16
    async with stage(tmp_path) as s:
        assert (await s.jobs.capabilities()).bfloat16 is bfloat16
        asked = spec(hyperparameters={"quantization": "none"}, publish={})
        resolved = await s.jobs.check(TENANT, asked)
    precision = Precision.BFLOAT16 if bfloat16 else Precision.FLOAT32
    assert resolved.hyperparameters.precision is precision
    assert resolved.publish is not None
    assert resolved.publish.gate.max_logprob_delta_mean == (0.2 if bfloat16 else 0.01)


@pytest.mark.parametrize(("capability", "bfloat16"), [("9.0", True), ("7.5", False)])
async def test_a_gpu_is_asked_through_its_driver(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capability: str, bfloat16: bool
) -> None:
    answer = GPU_ANSWER.format(capability=capability)
    python(tmp_path, f"[ $1 = --id=3 ] && echo '{answer}'", "nvidia-smi")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.defpath}")
    facts = device_facts(Device("3"))
    assert facts.memory_bytes == 81559 * 2**20
    assert facts.memory_available_bytes == 70000 * 2**20
    assert facts.bfloat16 is bfloat16
    with pytest.raises(TrainingUnavailable, match="GPU 4 does not answer"):
        device_facts(Device("4"))
    async with stage(tmp_path, devices=[Device("3")]) as s:
        assert (await s.jobs.capabilities()).bfloat16 is bfloat16
        if bfloat16:
            resolved = await s.jobs.check(TENANT, spec())
            assert resolved.hyperparameters.fit_micro_batch is True
        else:
            said = await refusal(s, spec(), InvalidSpec)
            assert said.startswith("spec.hyperparameters.precision")


async def test_an_estimate_reads_the_dataset_and_the_model(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    weights = {"model.layers.0.self_attn.q_proj.weight": np.zeros((64, 64), np.float32)}
    save_file(weights, model / "model.safetensors")
    config = {"hidden_size": 64, "num_hidden_layers": 1, "vocab_size": 100}
    (model / "config.json").write_text(json.dumps(config))
    async with stage(tmp_path, price=Price(2.0, "EUR")) as s:
        found = await s.jobs.estimate(TENANT, spec())
        assert (found.rows, found.tokens) == (38, 38 * 10 * 3)
        assert found.adapter_bytes == 32 * 128 * 4
        assert not found.measured and found.cost and found.currency == "EUR"
        await s.create("one")
        await s.ended("one")
        measured = await s.jobs.estimate(TENANT, spec())
        assert measured.measured
        assert measured.duration_s < 38 * 30 / 100 + 30
        await s.add_dataset("bad", "rubbish\n")
        with pytest.raises(DatasetInvalid):
            await s.jobs.estimate(TENANT, spec(dataset="bad"))


async def test_two_that_ask_at_once_are_answered(tmp_path: Path) -> None:
    async with stage(tmp_path) as s:
        first, second = await asyncio.gather(s.jobs.capabilities(), s.jobs.capabilities())
    assert first == second
