"""What importing the client costs others."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

CLIENT = Path(__file__).parents[2] / "clients" / "python"
HEAVY = {"torch", "vllm", "pydantic", "transformers", "numpy", "gateway", "engine", "trainer"}
NOT_A_DEPENDENCY = {"google.rpc", "grpc_status"}


def test_importing_the_client_pulls_in_grpc_and_protobuf_alone() -> None:
    program = "import lora_gateway, sys; print(*sys.modules)"
    output = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        check=True,
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(CLIENT)},
    ).stdout
    imported = set(output.split())

    assert "lora_gateway.client" in imported
    assert not imported & (HEAVY | NOT_A_DEPENDENCY)
