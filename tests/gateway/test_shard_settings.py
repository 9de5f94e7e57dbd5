"""How many shards there are, and what each runs on."""

from __future__ import annotations

import os

import pytest

from engine import processors
from gateway import settings as settings_module
from gateway.lending_terms import Terms, lender_of
from gateway.settings import Settings, SettingsError
from gateway.worker_count import default_workers

BINDING, GPUS = "VLLM_CPU_OMP_THREADS_BIND", "CUDA_VISIBLE_DEVICES"


def refusal(*argv: str) -> str:
    """The line that says why these flags cannot be."""
    with pytest.raises(SettingsError) as caught:
        Settings.from_argv(argv)
    return str(caught.value)


def has_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings_module, "_engine_runs_on_cpu", lambda: False)


def test_each_shard_has_gpus_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    has_gpus(monkeypatch)
    settings = Settings(shards=3, devices_per_shard=2)
    assert settings.shard_names == ["shard-0", "shard-1", "shard-2"]
    monkeypatch.delenv(GPUS, raising=False)
    assert [settings.gpus(shard) for shard in range(3)] == [["0", "1"], ["2", "3"], ["4", "5"]]
    with settings.environment_of(1):
        assert os.environ[GPUS] == "2,3"
        assert BINDING not in os.environ
    assert GPUS not in os.environ
    monkeypatch.setenv(GPUS, "7, 6,GPU-5,4,3,2")
    assert [settings.gpus(shard) for shard in range(3)] == [["7", "6"], ["GPU-5", "4"], ["3", "2"]]
    with settings.environment_of(1):
        assert os.environ[GPUS] == "GPU-5,4"
    assert os.environ[GPUS] == "7, 6,GPU-5,4,3,2"


def test_workers_are_as_many_as_told_or_as_the_shards_are_worth(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv(GPUS, raising=False)
    monkeypatch.setattr(processors, "usable", lambda: 16)
    assert Settings(shards=1).worker_count == 1
    has_gpus(monkeypatch)
    assert Settings(shards=2).worker_count == default_workers(2, 1, 16) == 4
    assert Settings(shards=2, devices_per_shard=4).worker_count == default_workers(2, 4, 16)
    assert Settings(shards=2, workers=1).worker_count == 1


@pytest.mark.parametrize(("visible", "named"), [("", 0), ("3", 1), ("3,4", 2)])
def test_fewer_gpus_than_the_shards_need_are_refused(
    monkeypatch: pytest.MonkeyPatch, visible: str, named: int
) -> None:
    has_gpus(monkeypatch)
    monkeypatch.setenv(GPUS, visible)
    assert refusal("--shards", "3") == (
        "--shards 3 with --devices-per-shard 1 needs 3 GPUs, and CUDA_VISIBLE_DEVICES names "
        f"{named}: name more there"
    )


def test_each_shard_on_a_cpu_has_processors_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    shares = [(0, 1), (2, 3)]
    monkeypatch.setattr(processors, "shares", lambda shards: shares)
    settings = Settings(shards=2)
    assert settings.gpus(1) == []
    for before in (None, "5"):
        if before is not None:
            monkeypatch.setenv(BINDING, before)
        with settings.environment_of(1):
            assert os.environ[BINDING] == "2,3"
        assert os.environ.get(BINDING) == before
    with Settings().environment_of(0):
        assert os.environ[BINDING] == "5", "one shard has what the operator says"


def test_a_device_that_trains_is_lent_by_the_shard_that_serves_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    has_gpus(monkeypatch)
    settings = Settings(shards=2, devices_per_shard=2, lend_shards="spare")
    assert settings.devices_that_train == ["2", "3"], "by itself those of the last shard"
    lenders = [lender_of(settings, device) for device in ("0", "1", "2", "3", "4", "cpu")]
    assert lenders == ["shard-0", "shard-0", "shard-1", "shard-1", "", ""]
    kept = Settings(shards=2, devices_per_shard=2, training_devices=["0"])
    assert kept.devices_that_train == ["0"] and lender_of(kept, "0") == ""


def test_the_cpu_is_lent_by_the_last_shard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processors, "shares", lambda shards: [(0,)] * shards)
    settings = Settings(shards=2, lend_shards="always", drain_grace_s=7, lend_limit_s=90)
    assert [lender_of(settings, device) for device in ("cpu", "0")] == ["shard-1", ""]
    assert Terms.of(settings) == Terms(True, 7.0, 0.0, 90.0, 60.0)
    assert lender_of(Settings(), "cpu") == "", "off unless it is asked for"


def test_what_a_cpu_cannot_do_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert refusal("--devices-per-shard", "2") == (
        "--devices-per-shard is for GPUs; a CPU engine is one device"
    )
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0})
    assert refusal("--shards", "2") == (
        "2 shards on 1 processors would wait for each other; give each at least one of its own"
    )
    assert Settings(shards=1).shard_names == ["shard-0"]


@pytest.mark.parametrize("count", ["0", "65"])
def test_there_are_1_to_64_shards(count: str) -> None:
    assert refusal("--shards", count).startswith("--shards: ")
