"""What cannot start says so in one line, exits non-zero, and leaves no process."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest

from store.state_folder import StateFolder
from tests.gateway.certificates import Authority

START_TIMEOUT_S = 120.0


def refused(*flags: str) -> str:
    """The one line that `gateway serve` prints on stderr before it gives up."""
    process = subprocess.Popen(
        [sys.executable, "-m", "gateway", "serve", *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    output, errors = process.communicate(timeout=START_TIMEOUT_S)
    assert process.returncode == 1, errors
    assert not output, "nothing was served"
    assert "Traceback" not in errors
    lines = [line for line in errors.splitlines() if line.startswith("gateway serve: ")]
    assert len(lines) == 1, errors
    _, alive = psutil.wait_procs(in_group(process.pid), timeout=5)
    assert not alive, "no process is left"
    return lines[0]


def in_group(group: int) -> list[psutil.Process]:
    """The processes of a process group."""
    found = []
    for process in psutil.process_iter():
        try:
            if os.getpgid(process.pid) == group:
                found.append(process)
        except ProcessLookupError:
            continue
    return found


def local(state: Path) -> Sequence[str]:
    """Flags of a gateway that could start."""
    return (
        *("--model", "tiny", "--state-dir", str(state)),
        *("--listen", "127.0.0.1:0", "--metrics-listen", "127.0.0.1:0"),
    )


def test_a_missing_model(tmp_path: Path) -> None:
    line = refused(*local(tmp_path), "--model", "no-such-model")
    assert "no-such-model" in line and "smollm2-135m" in line, "it says what there is"


@pytest.mark.parametrize("flag", ["--listen", "--metrics-listen"])
def test_a_taken_port(flag: str, tmp_path: Path) -> None:
    with socket.socket() as holder:
        # As another gateway's workers do: the kernel would let a second one join in silence.
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        address = f"127.0.0.1:{holder.getsockname()[1]}"
        line = refused(*local(tmp_path), flag, address)
    assert address in line and f"pass another {flag}" in line


def test_a_locked_state_folder(tmp_path: Path) -> None:
    with StateFolder(tmp_path):
        line = refused(*local(tmp_path))
    assert f"process {os.getpid()}" in line and "--state-dir" in line


@pytest.mark.parametrize("flag", ["--listen", "--metrics-listen"])
def test_no_tls_on_a_public_address(flag: str, tmp_path: Path) -> None:
    line = refused(*local(tmp_path), flag, "0.0.0.0:0")
    assert flag in line and "--insecure" in line


def test_an_adapter_flag_without_a_path(tmp_path: Path) -> None:
    assert "NAME=PATH" in refused(*local(tmp_path), "--adapter", "pirate")


def test_a_flag_that_does_not_exist() -> None:
    """As argparse answers: how it is used, and then the one line."""
    done = subprocess.run(
        [sys.executable, "-m", "gateway", "serve", "--modell", "tiny"],
        capture_output=True,
        text=True,
        timeout=START_TIMEOUT_S,
    )
    assert done.returncode == 2
    assert not done.stdout
    assert done.stderr.startswith("usage: gateway serve ")
    assert "--model " in done.stderr
    assert done.stderr.splitlines()[-1] == (
        "gateway serve: error: unrecognized arguments: --modell tiny"
    )


def test_a_key_of_another_certificate(tmp_path: Path) -> None:
    """Before the model is loaded, which takes a minute."""
    authority = Authority(tmp_path / "ca.pem")
    cert, _ = authority.issue(tmp_path, "server")
    _, key = authority.issue(tmp_path, "other")
    line = refused(*local(tmp_path), "--tls-cert", str(cert), "--tls-key", str(key))
    assert f"--tls-key {key}" in line and "cannot be used" in line


def test_a_broken_adapter(tmp_path: Path) -> None:
    """Every finding is in the line, and no core was started to find out."""
    folder = tmp_path / "broken"
    folder.mkdir()
    config = {"peft_type": "LORA", "r": 512, "lora_alpha": 8, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (folder / "adapter_model.safetensors").write_bytes(b"not a safetensors file")
    line = refused(*local(tmp_path / "state"), "--adapter", f"broken={folder}")
    assert "'broken' cannot be served" in line and "512" in line and "safetensors" in line
