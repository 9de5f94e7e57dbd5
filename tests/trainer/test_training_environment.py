from __future__ import annotations

from pathlib import Path

import pytest

from trainer.environment import training_environment
from trainer.run_folder import RunFolder

RUN = RunFolder(Path("/state/jobs/u1/attempts/1"))


@pytest.mark.parametrize(("device", "visible"), [("cpu", ""), ("3", "3")])
def test_a_process_sees_the_device_that_it_has(device: str, visible: str) -> None:
    environment = training_environment({"CUDA_VISIBLE_DEVICES": "0,1"}, RUN, device)
    assert environment["CUDA_VISIBLE_DEVICES"] == visible


def test_nothing_is_fetched_and_nobody_is_counted() -> None:
    environment = training_environment({"HF_HUB_OFFLINE": "0"}, RUN, "cpu")
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "UNSLOTH_DISABLE_STATISTICS"):
        assert environment[name] == "1"


def test_the_hubs_token_is_not_handed_on_and_the_rest_is() -> None:
    environment = training_environment({"HF_TOKEN": "hf_x", "PATH": "/bin"}, RUN, "cpu")
    assert "HF_TOKEN" not in environment and environment["PATH"] == "/bin"


def test_generated_code_of_runs_is_apart() -> None:
    other = RunFolder(Path("/state/jobs/u1/attempts/2"))
    places = {
        training_environment({}, run, "cpu")["UNSLOTH_COMPILE_LOCATION"] for run in (RUN, other)
    }
    assert len(places) == 2 and all("/attempts/" in place for place in places)


def test_threads_wait_without_a_core_on_a_cpu_that_is_shared() -> None:
    assert training_environment({}, RUN, "cpu")["OMP_WAIT_POLICY"] == "PASSIVE"
    assert "OMP_WAIT_POLICY" not in training_environment({}, RUN, "0")
