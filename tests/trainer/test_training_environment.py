from __future__ import annotations

from pathlib import Path

import pytest

from trainer.environment import training_environment, without_secrets
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


@pytest.mark.parametrize(
    "name",
    [
        "HF_TOKEN",
        "HUGGING_FACE_HUB_TOKEN",
        "AWS_ACCESS_KEY_ID",
        "AWS_PROFILE",
        "GOOGLE_APPLICATION_CREDENTIALS",
        "AZURE_CLIENT_ID",
        "WANDB_API_KEY",
        "ACCESS_KEY_ID",
        "DB_PASSWORD",
        "PG_PASSWORD_FILE",
        "A_SECRET",
        "CLIENT_SECRET_FILE",
        "GATEWAY_TOKENS_FILE",
        "github_token",
    ],
)
def test_pitfalls_secrets_are_not_handed_on_and_the_rest_is(name: str) -> None:
    others = {"PATH": "/bin", "HOME": "/home", "LD_LIBRARY_PATH": "/lib", "OMP_NUM_THREADS": "2"}
    environment = training_environment({name: "x", **others}, RUN, "cpu")
    assert name not in environment
    assert others.items() <= environment.items()
    assert without_secrets({name: "x", **others}) == others


def test_generated_code_of_runs_is_apart() -> None:
    other = RunFolder(Path("/state/jobs/u1/attempts/2"))
    places = {
        training_environment({}, run, "cpu")["UNSLOTH_COMPILE_LOCATION"] for run in (RUN, other)
    }
    assert len(places) == 2 and all("/attempts/" in place for place in places)


def test_threads_wait_without_a_core_on_a_cpu_that_is_shared() -> None:
    assert training_environment({}, RUN, "cpu")["OMP_WAIT_POLICY"] == "PASSIVE"
    assert "OMP_WAIT_POLICY" not in training_environment({}, RUN, "0")
