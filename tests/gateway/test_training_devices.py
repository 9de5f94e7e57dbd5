"""What `--training-devices` gives training: what it names, what `auto` finds, or nothing."""

from __future__ import annotations

import pytest

from gateway import settings as settings_module
from gateway.settings import Settings, SettingsError


@pytest.fixture(autouse=True)
def no_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GATEWAY_TRAINING_DEVICES", raising=False)


@pytest.mark.parametrize(
    ("given", "on_cpu", "devices"),
    [
        (None, True, ["cpu"]),
        (None, False, []),
        ("auto", True, ["cpu"]),
        ("", True, ["cpu"]),
        ("none", True, []),
        ("cpu", False, ["cpu"]),
        ("0,1,2", True, ["0", "1", "2"]),
    ],
)
def test_a_flag_and_its_variable_give_the_same_devices(
    given: str | None, on_cpu: bool, devices: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings_module, "_engine_runs_on_cpu", lambda: on_cpu)
    argv = [] if given is None else ["--training-devices", given]
    assert Settings.from_argv(argv).devices_that_train == devices
    if given is not None:
        monkeypatch.setenv("GATEWAY_TRAINING_DEVICES", given)
        assert Settings.from_argv([]).devices_that_train == devices


def test_devices_are_repeated_or_joined_by_commas() -> None:
    flag = "--training-devices"
    assert Settings.from_argv([flag, "0", flag, "cpu,1"]).devices_that_train == ["0", "cpu", "1"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("none,cpu", "none stands alone; leave it out, or the others"),
        ("0,auto", "auto stands alone; leave it out, or the others"),
        ("None", "'None' is neither cpu nor the number of a GPU"),
        ("0,0", "names a device twice; give each once"),
    ],
)
def test_devices_that_cannot_be_meant_are_refused(given: str, said: str) -> None:
    with pytest.raises(SettingsError) as caught:
        Settings.from_argv(["--training-devices", given])
    assert str(caught.value) == f"--training-devices: {said}"
