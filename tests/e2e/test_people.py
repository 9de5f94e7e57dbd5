"""What people type: the command, the examples, `buf curl`, all against the real gateway."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.gateway_process import GatewayProcess

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent


def run(*command: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """Run a command as a person would, in the checkout."""
    environment = {**os.environ, "BUF": str(BIN / "buf"), "PATH": f"{BIN}:{os.environ['PATH']}"}
    return subprocess.run(
        command, cwd=ROOT, env=environment, input=stdin, capture_output=True, text=True, timeout=90
    )


def gateway_command(gateway: GatewayProcess, *arguments: str, stdin: str = "") -> str:
    """Output of a `gateway` command that succeeds."""
    done = run(
        sys.executable, "-m", "gateway", *arguments, "--target", gateway.address, stdin=stdin
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_gateway_generate_streams_and_adapters_differ(gateway: GatewayProcess) -> None:
    arguments = ("generate", "Once upon a time", "--max-tokens", "12", "--temperature", "0")
    base = gateway_command(gateway, *arguments)
    adapted = gateway_command(gateway, *arguments, "--adapter", "pirate")
    assert base.strip() and adapted.strip() and base != adapted
    whole = gateway_command(gateway, *arguments, "--no-stream")
    assert whole.strip() == base.strip()


def test_gateway_generate_tells_an_error_in_one_line(gateway: GatewayProcess) -> None:
    done = run(
        *(sys.executable, "-m", "gateway", "generate", "hi"),
        *("--adapter", "nobody", "--target", gateway.address),
    )
    assert done.returncode == 1
    assert "NOT_FOUND ADAPTER_NOT_FOUND" in done.stderr and "served here" in done.stderr
    assert "Traceback" not in done.stderr


def test_gateway_chat_answers_each_line(gateway: GatewayProcess) -> None:
    output = gateway_command(gateway, "chat", "--max-tokens", "8", stdin="Hello\nAnd you?\n")
    assert output.strip()


def test_gateway_model_is_json_when_asked(gateway: GatewayProcess) -> None:
    model = json.loads(gateway_command(gateway, "model", "--json"))
    assert "tiny" in json.dumps(model)


@pytest.mark.parametrize("example", ["generate.py", "stream.py"])
def test_python_examples_run(gateway: GatewayProcess, example: str) -> None:
    done = run(sys.executable, f"examples/{example}", gateway.address)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_buf_curl_example_runs(gateway: GatewayProcess) -> None:
    done = run("bash", "examples/bufcurl.sh", gateway.address)
    assert done.returncode == 0, done.stdout + done.stderr
    assert '"adapter": "pirate"' in done.stdout and '"finished"' in done.stdout
