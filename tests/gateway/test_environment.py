"""What `gateway serve` leaves in the environment for the libraries below it."""

from __future__ import annotations

import os
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from gateway import settings as settings_module
from gateway.settings import Settings, prepare_environment, training_environment_base

DEFAULTED = {
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_CPU_KVCACHE_SPACE": "3",
    "VLLM_MAX_N_SEQUENCES": "64",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
}


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """A process environment of its own, as bare as can be."""
    bare = {"PATH": "/usr/bin"}
    monkeypatch.setattr(os, "environ", bare)
    return bare


def test_what_the_libraries_read_is_prepared(environment: dict[str, str], tmp_path: Path) -> None:
    prepare_environment(Settings(cpu_kv_cache_gib=3), tmp_path)
    assert environment["PROMETHEUS_MULTIPROC_DIR"] == str(tmp_path)
    assert environment["VLLM_WORKER_MULTIPROC_METHOD"] == "spawn"
    assert environment.items() >= DEFAULTED.items()


def test_what_an_operator_has_set_stays(environment: dict[str, str], tmp_path: Path) -> None:
    mine = dict.fromkeys(DEFAULTED, "mine")
    environment.update(mine)
    prepare_environment(Settings(), tmp_path)
    assert environment.items() >= mine.items()


def test_what_correctness_needs_is_set_whatever_an_operator_says(
    environment: dict[str, str], tmp_path: Path
) -> None:
    environment.update({"VLLM_WORKER_MULTIPROC_METHOD": "fork", "PROMETHEUS_MULTIPROC_DIR": "/x"})
    environment["VLLM_RPC_BASE_PATH"] = "/y"
    prepare_environment(Settings(), tmp_path)
    assert environment["VLLM_WORKER_MULTIPROC_METHOD"] == "spawn"
    assert environment["PROMETHEUS_MULTIPROC_DIR"] == str(tmp_path)
    assert environment["VLLM_RPC_BASE_PATH"] == str(tmp_path), "sockets go with the run folder"


def test_programs_beside_this_python_are_found_first(
    environment: dict[str, str], tmp_path: Path
) -> None:
    prepare_environment(Settings(), tmp_path)
    assert environment["PATH"].split(os.pathsep) == [str(Path(sys.executable).parent), "/usr/bin"]


@pytest.mark.parametrize("on_cpu", [True, False])
def test_helpers_are_not_compiled_where_the_engine_runs_on_cpu(
    on_cpu: bool, environment: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def distribution(name: str) -> None:
        if not on_cpu:
            raise PackageNotFoundError(name)

    monkeypatch.setattr(settings_module, "distribution", distribution)
    prepare_environment(Settings(), tmp_path)
    assert ("TORCHDYNAMO_DISABLE" in environment) is on_cpu


def test_helpers_are_compiled_where_an_operator_wants_it(
    environment: dict[str, str], tmp_path: Path
) -> None:
    environment["TORCHDYNAMO_DISABLE"] = "0"
    prepare_environment(Settings(), tmp_path)
    assert environment["TORCHDYNAMO_DISABLE"] == "0"


# --- what training inherits --------------------------------------------------


def test_training_inherits_nothing_that_is_for_the_engine(
    environment: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings_module, "_engine_runs_on_cpu", lambda: True)
    mine = {"LANG": "C", "PATH": "/usr/bin"}
    environment.clear()  # pytest writes into it, too
    environment.update(mine | {"VLLM_LOGGING_LEVEL": "INFO"})
    found = prepare_environment(Settings(), tmp_path)
    environment["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # as vLLM does when it is imported
    assert environment["TORCHDYNAMO_DISABLE"] == "1"
    base = training_environment_base(Settings(), found)
    assert base == mine | {"PATH": f"{Path(sys.executable).parent}:/usr/bin"}


def test_training_inherits_what_an_operator_has_set(
    environment: dict[str, str], tmp_path: Path
) -> None:
    mine = {"TORCHDYNAMO_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "info", "PYTHONWARNINGS": "error"}
    environment.update(mine)
    found = prepare_environment(Settings(), tmp_path)
    assert training_environment_base(Settings(), found).items() >= mine.items()


def test_programs_beside_the_python_that_trains_are_found_first(tmp_path: Path) -> None:
    python = tmp_path / "other" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.touch()
    base = training_environment_base(Settings(training_python=python), {"PATH": "/usr/bin"})
    assert base["PATH"].split(os.pathsep) == [str(python.parent), "/usr/bin"]
