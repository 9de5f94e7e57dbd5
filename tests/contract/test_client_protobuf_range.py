"""The client runs under the oldest and the newest protobuf and grpcio that it allows.

Each end of the range gets an environment of its own, `.venv-client-*`, which is kept: the
first run installs (seconds, and a package registry), later ones do not.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CLIENT = ROOT / "clients" / "python"
SERVER_LOCK = ROOT / "requirements" / "cpu.txt"

PROBE = """
import importlib, json, pkgutil

import google.protobuf, grpc
import lora_gateway, lora_gateway.v1
for module in pkgutil.iter_modules(lora_gateway.v1.__path__):
    importlib.import_module("lora_gateway.v1." + module.name)

from lora_gateway.v1 import inference_pb2 as pb, inference_pb2_grpc
request = pb.GenerateRequest(
    adapter="pirate", text="Ahoy", sampling=pb.SamplingParams(temperature=0, stop=["."])
)
copy = pb.GenerateRequest.FromString(request.SerializeToString())
assert copy == request
assert copy.sampling.HasField("temperature") and not copy.sampling.HasField("top_p")
with grpc.insecure_channel("127.0.0.1:1") as channel:
    inference_pb2_grpc.InferenceStub(channel)
print(json.dumps({"protobuf": google.protobuf.__version__, "grpcio": grpc.__version__}))
"""


def run(*command: str | Path, env: dict[str, str] | None = None) -> str:
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout


def environment(end: str, resolution: str) -> Path:
    """Python of the environment at one end of the range, made unless it is there."""
    folder = ROOT / f".venv-client-{end}"
    python = folder / "bin" / "python"
    stamp = folder / ".ready"
    made_from = json.dumps(
        [
            sys.version,
            (CLIENT / "pyproject.toml").read_text(),
            SERVER_LOCK.read_text(),
        ]
    )
    if not stamp.exists() or stamp.read_text() != made_from:
        bin_of_this = Path(sys.executable).parent
        uv = shutil.which("uv", path=f"{bin_of_this}{os.pathsep}{os.environ['PATH']}")
        assert uv is not None, "`make setup` puts uv into .venv"
        dependencies = CLIENT / "pyproject.toml"
        run(uv, "venv", "--quiet", "--clear", "--python", sys.executable, folder)
        run(
            *(uv, "pip", "install", "--quiet", "--python", python),
            *("--resolution", resolution, "-r", dependencies),
        )
        stamp.write_text(made_from)
    return python


def versions(end: str, resolution: str) -> dict[str, str]:
    """Run the probe at one end of the range."""
    python = environment(end, resolution)
    answer = run(python, "-W", "error", "-c", PROBE, env={"PYTHONPATH": str(CLIENT)})
    return dict(json.loads(answer))


def numbers(version: str) -> list[int]:
    return [int(part) for part in version.split(".")]


@pytest.mark.timeout(600)
def test_the_client_runs_under_the_oldest_protobuf_and_grpcio_it_allows() -> None:
    project = tomllib.loads((CLIENT / "pyproject.toml").read_text())["project"]
    oldest = versions("oldest", "lowest-direct")
    floors = dict(re.findall(r"(\w+)>=([\d.]+)", " ".join(project["dependencies"])))
    assert floors.keys() == oldest.keys()
    for name, floor in floors.items():
        assert numbers(oldest[name])[: len(numbers(floor))] == numbers(floor)


@pytest.mark.timeout(600)
def test_the_client_runs_under_the_newest_protobuf_and_grpcio_it_allows() -> None:
    newest = versions("newest", "highest")
    for name, version in newest.items():
        locked = re.search(rf"^{name}==(.+)$", SERVER_LOCK.read_text(), re.MULTILINE)
        assert locked and numbers(version) >= numbers(locked[1])
