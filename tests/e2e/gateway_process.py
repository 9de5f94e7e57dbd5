"""A real gateway in processes of its own, as an operator runs it, for the end-to-end tests."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import psutil
from prometheus_client.parser import text_string_to_metric_families

from gateway.run_dir import LOCK_FILE, PREFIX, sweep

START_TIMEOUT_S = 240.0
"""Three imports of vLLM, one after the other, on two busy cores."""


class GatewayProcess:
    """`gateway serve` in a process group of its own."""

    def __init__(
        self,
        arguments: Sequence[str],
        state_dir: Path,
        log: Path,
        program: Sequence[str] = ("-m", "gateway"),
    ) -> None:
        """`program` is what Python runs; it takes the arguments of `gateway`."""
        self._log = log
        self._output = log.open("w")
        self.process = subprocess.Popen(
            [
                *(sys.executable, *program, "serve"),
                *("--state-dir", str(state_dir), "--listen", "127.0.0.1:0"),
                *("--metrics-listen", "127.0.0.1:0", *arguments),
            ],
            stdout=self._output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self.address = ""
        self.metrics_url = ""

    def wait_serving(self) -> None:
        """Wait for the line that says so. Fails with the log if the process ends instead."""
        line = self.wait_log(r"SERVING on (\S+): .*metrics (\S+)", START_TIMEOUT_S)
        self.address, self.metrics_url = line.group(1), line.group(2)

    def wait_standby(self) -> None:
        """Wait until the spare worker has finished its imports, which take a processor for
        seconds."""
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while sum(self.metrics("gateway_workers", state="standby")) < 1:
            assert time.monotonic() < deadline_s, "no standby worker"
            time.sleep(0.5)

    def wait_log(self, pattern: str, timeout_s: float, *, count: int = 1) -> re.Match[str]:
        """Wait until the log has `count` matches; returns the last."""
        deadline_s = time.monotonic() + timeout_s
        while True:
            matches = list(re.finditer(pattern, self.log))
            if len(matches) >= count:
                return matches[-1]
            assert self.process.poll() is None, f"the gateway ended:\n{self.log}"
            assert time.monotonic() < deadline_s, f"no {pattern!r} in:\n{self.log}"
            time.sleep(0.02)

    @property
    def log(self) -> str:
        """All that the gateway printed."""
        return self._log.read_text()

    def family(self) -> list[psutil.Process]:
        """The host and every process below it."""
        host = psutil.Process(self.process.pid)
        return [host, *host.children(recursive=True)]

    @property
    def run_dir(self) -> Path:
        """Its run folder, by the lock that it holds there."""
        files = psutil.Process(self.process.pid).open_files()
        locks = [Path(file.path) for file in files if Path(file.path).name == LOCK_FILE]
        return next(lock.parent for lock in locks if lock.parent.name.startswith(PREFIX))

    def serving_workers(self) -> list[int]:
        """Pids of the workers that serve, in the order in which they began to."""
        pids = [int(pid) for pid in re.findall(r"worker (\d+) is serving", self.log)]
        return [pid for pid in pids if psutil.pid_exists(pid)]

    def metrics(self, name: str, **labels: str) -> list[float]:
        """Values of the samples called `name` that have these labels."""
        with urllib.request.urlopen(self.metrics_url, timeout=30) as response:
            text = response.read().decode()
        return [
            sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        ]

    def signal(self, number: signal.Signals, *, group: bool = False) -> None:
        """Send a signal to the host, or to its whole process group."""
        if group:
            os.killpg(self.process.pid, number)
        else:
            self.process.send_signal(number)

    def wait_exit(self, timeout_s: float) -> int:
        """Wait for the host to end; returns its exit code."""
        return self.process.wait(timeout_s)

    def close(self) -> None:
        """End whatever is left of it."""
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in self.family():
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        self.process.wait()
        self._output.close()
        sweep(Path(tempfile.gettempdir()))  # as the next start would


@contextlib.contextmanager
def gateway_process(
    folder: Path,
    *,
    model: str = "tiny",
    workers: int = 1,
    adapters: Mapping[str, Path] | None = None,
    extra: Sequence[str] = (),
    program: Sequence[str] = ("-m", "gateway"),
) -> Iterator[GatewayProcess]:
    """A gateway until the end of the block. The tiny model is served in float32, others as
    they are."""
    dtype = "float32" if model == "tiny" else "auto"
    arguments = ["--model", model, "--dtype", dtype, "--max-model-len", "2048"]
    arguments += ["--workers", str(workers), *extra]
    for name, path in (adapters or {}).items():
        arguments += ["--adapter", f"{name}={path}"]
    gateway = GatewayProcess(arguments, folder / "state", folder / "gateway.log", program)
    try:
        gateway.wait_serving()
        yield gateway
    finally:
        gateway.close()
