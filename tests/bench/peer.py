"""A side that is vLLM's own: `vllm serve`, behind its Python front end or its Rust one.

Both run the engine options of the other sides, with what this environment adds to vLLM's engine
core too. They are given what makes them fast: no log of requests.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.error import HTTPError

from tests.bench.front_end import CallsFailed, Kind
from tests.bench.h2load import run_h2load_http
from tests.bench.http_client import BASE_MODEL
from tests.bench.peer_tally import PeerTally
from tests.bench.side import Side
from tests.bench.workload import ADAPTER, Round, Workload

if TYPE_CHECKING:
    from engine.core import EngineOptions

ROOT = Path(__file__).parents[2]
RUST_BINARY = "lib/python*/site-packages/vllm/vllm-rs"
"""In the environment that has the wheel for GPUs, which alone has it (Makefile)."""
START_TIMEOUT_S = 240.0
COUNTED_TIMEOUT_S = 10.0
"""Until a server has counted a call that it has answered."""
STOP_TIMEOUT_S = 30.0
MOST_TOLD = 300
"""Characters of what a server says when it does not load an adapter."""


class PeerFailed(Exception):
    """The server did not start; the message has the end of its log."""


class PeerSide:
    """One server, and clients of it."""

    def __init__(
        self,
        kind: Kind,
        folder: Path,
        adapter: Path,
        arguments: Sequence[str],
        environment: Mapping[str, str],
    ) -> None:
        """Start it, and have it load the adapter. Raises PeerFailed."""
        self.kind = kind
        self._owned = ExitStack()
        self._log = folder / f"{kind.name}.log"
        try:
            self._address = self._start(arguments, environment)
            self.refused_adapter = self._load(adapter)
            """What it said instead of loading the adapter; empty if it did."""
            self._client = Side(
                "tests.bench.http_client", [self._address], folder / f"{kind.name}-client.log"
            )
            self._owned.callback(self._client.close)
            self._client.wait_ready()
        except BaseException:
            self._owned.close()
            raise

    def serves(self, adapter: str) -> bool:
        """The base model, and the adapter if it could load it."""
        return not (adapter and self.refused_adapter)

    def round(self, workload: Workload) -> Round:
        """Run the workload for throughput. Raises LoadFailed or CallsFailed."""
        before = self._tally()
        measured = run_h2load_http(self._address, workload)
        self._check(workload, before)
        return measured

    def first_tokens(self, workload: Workload) -> list[float]:
        """Run the workload one request at a time; seconds to each first token."""
        before = self._tally()
        measured = self._client.first_tokens(workload)
        self._check(workload, before)
        return measured

    def text(self, workload: Workload) -> str:
        """The answer to one request of the workload."""
        before = self._tally()
        answer = self._client.text(workload)
        self._check(workload, before, requests=1)
        return answer

    def close(self) -> None:
        """End clients and server."""
        self._owned.close()

    def _start(self, arguments: Sequence[str], environment: Mapping[str, str]) -> str:
        port = _free_port()
        with self._log.open("w") as output:
            process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "tests.bench.leash"),
                    *(sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", *arguments),
                    *("--host", "127.0.0.1", "--port", f"{port}"),
                ],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **environment},
            )
        self._owned.callback(_end, process)
        address = f"127.0.0.1:{port}"
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while not _is_healthy(address):
            if process.poll() is not None or time.monotonic() > deadline_s:
                raise PeerFailed(f"{self.kind} did not start:\n{self._log.read_text()[-4000:]}")
            time.sleep(0.2)
        return address

    def _load(self, adapter: Path) -> str:
        request = urllib.request.Request(
            f"http://{self._address}/v1/load_lora_adapter",
            json.dumps({"lora_name": ADAPTER, "lora_path": str(adapter)}).encode(),
            {"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=START_TIMEOUT_S):
                return ""
        except HTTPError as refusal:
            return " ".join(refusal.read().decode().split())[:MOST_TOLD]

    def _check(self, workload: Workload, before: PeerTally, requests: int | None = None) -> None:
        """Raises CallsFailed unless it counts all requests, whole, in a while."""
        requests = requests or workload.requests
        asked = PeerTally(requests, 0, requests * workload.tokens)
        deadline_s = time.monotonic() + COUNTED_TIMEOUT_S
        while (counted := self._tally().since(before)) != asked:
            if time.monotonic() > deadline_s:
                raise CallsFailed(f"{self.kind} counted {counted} and not {asked}")
            time.sleep(0.05)

    def _tally(self) -> PeerTally:
        with urllib.request.urlopen(f"http://{self._address}/metrics", timeout=30) as response:
            return PeerTally.of(response.read().decode())


def peer_arguments(options: EngineOptions, max_num_batched_tokens: int) -> list[str]:
    """What `vllm serve` is told, to run the same engine as the other sides."""
    flags = {
        "--served-model-name": BASE_MODEL,
        "--dtype": options.dtype,
        "--quantization": options.quantization,
        "--max-model-len": options.max_model_len,
        "--max-num-seqs": options.max_num_seqs,
        "--max-num-batched-tokens": max_num_batched_tokens,
        "--gpu-memory-utilization": options.gpu_memory_utilization,
        "--max-loras": options.max_loras,
        "--max-cpu-loras": options.max_cpu_loras,
        "--max-lora-rank": options.max_lora_rank,
        "--generation-config": "vllm",  # all that requests leave out is vLLM's own
    }
    given = [f"{flag}={value}" for flag, value in flags.items() if value is not None]
    return [str(options.model_path), "--enable-lora", "--disable-uvicorn-access-log", *given]


def peer_environment(folder: Path, cpu_kv_cache_gib: int) -> dict[str, str]:
    """The environment of `vllm serve`. As the gateway's, where the engine reads it."""
    environment = {
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        # Adapters are loaded by a call: one that fails leaves the server as it is.
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        "VLLM_RUNTIME_LORA_ALLOWED_PATH_PREFIXES": str(folder),
        "TOKENIZERS_PARALLELISM": "false",
    }
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    try:
        version("vllm")
    except PackageNotFoundError:
        paths.insert(0, str(_named_vllm(folder)))
        environment |= {
            "VLLM_CPU_KVCACHE_SPACE": str(cpu_kv_cache_gib),
            "TORCHDYNAMO_DISABLE": "1",
            "TORCH_CPP_LOG_LEVEL": "ERROR",
        }
    return {"PYTHONPATH": os.pathsep.join(filter(None, paths)), **environment}


def rust_environment(binary: Path) -> dict[str, str]:
    """What makes `vllm serve` use the Rust front end."""
    return {"VLLM_USE_RUST_FRONTEND": "1", "VLLM_RUST_FRONTEND_PATH": str(binary)}


def find_rust_front_end() -> Path | None:
    """The program that `make bench` has installed, or that came with vLLM for GPUs."""
    for environment in (Path(sys.prefix), ROOT / ".venv-bench"):
        for binary in environment.glob(RUST_BINARY):
            return binary
    return None


def _named_vllm(folder: Path) -> Path:
    """A folder that makes the package `vllm-cpu` known as `vllm` to whoever has it on its path:
    vLLM's own command asks for its version by that name."""
    metadata = folder / "named-vllm" / f"vllm-{version('vllm-cpu')}+cpu.dist-info" / "METADATA"
    metadata.parent.mkdir(parents=True, exist_ok=True)
    metadata.write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version('vllm-cpu')}+cpu\n")
    return metadata.parents[1]


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def _is_healthy(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"http://{address}/health", timeout=5):
            return True
    except OSError:  # urllib's own errors among them
        return False


def _end(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    process.stdin.close()
    process.wait(STOP_TIMEOUT_S)
