"""Workers over fake shards that share one port, as their owner sees them."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import psutil

from gateway.port import HeldPort

IDLE_TIMEOUT_S = 60.0


class WorkerEnded(Exception):
    """A worker ended unasked; the message is what it has printed."""


@dataclass(frozen=True, slots=True)
class Tally:
    """What one worker has done so far, and has now."""

    codes: dict[str, int]
    """Calls that ended, by status code."""
    tokens: int
    """Of calls that ended with OK."""
    outputs: int
    """That shards gave: each is a message of a stream, or the answer of a unary call."""
    open: int
    """Calls that a shard generates for."""
    processor_s: float
    uss_bytes: int
    """Memory that the end of the process would free."""

    @property
    def good(self) -> int:
        """Calls that ended with OK."""
        return self.codes.get("OK", 0)


class EdgeWorker:
    """One process of `edge_worker.py`."""

    def __init__(self, address: str, run_dir: Path, log: Path, shards: int, step_s: float) -> None:
        self._log = log
        with log.open("w") as output:
            self._process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "tests.bench.edge_worker"),
                    *(address, str(run_dir), f"{shards}", f"{step_s}"),
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                text=True,
            )
        self._process_info = psutil.Process(self._process.pid)

    def wait_ready(self) -> None:
        """Wait until it serves. Raises WorkerEnded."""
        self._receive()

    def tally(self, *, memory: bool = False) -> Tally:
        """Ask it. Its memory is 0 unless asked for: to find that takes the kernel a while."""
        assert self._process.stdin is not None
        self._process.stdin.write("tell\n")
        self._process.stdin.flush()
        told = json.loads(self._receive())
        used = self._process_info.cpu_times()
        uss_bytes = self._process_info.memory_full_info().uss if memory else 0
        return Tally(**told, processor_s=used.user + used.system, uss_bytes=uss_bytes)

    def close(self) -> None:
        """End it, in order if it can."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def _receive(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise WorkerEnded(f"exit code {self._process.wait()}:\n{self._log.read_text()[-4000:]}")
        return line


class EdgeSide:
    """Some workers on one port, each with a client of each of some fake shards."""

    def __init__(
        self, folder: Path, run_dir: Path, *, workers: int, shards: int, step_s: float
    ) -> None:
        self.workers = workers
        self._owned = ExitStack()
        port = HeldPort("127.0.0.1:0")
        self._owned.callback(port.close)
        self.address = port.address
        self._workers: Sequence[EdgeWorker] = []
        try:
            started = []
            for number in range(workers):
                log = folder / f"edge-{workers}-{number}.log"
                worker = EdgeWorker(port.address, run_dir, log, shards, step_s)
                self._owned.callback(worker.close)
                started.append(worker)
            for worker in started:
                worker.wait_ready()
        except BaseException:
            self._owned.close()
            raise
        self._workers = started

    def tallies(self, *, memory: bool = False) -> list[Tally]:
        """Of each worker."""
        return [worker.tally(memory=memory) for worker in self._workers]

    def wait_idle(self) -> list[Tally]:
        """Wait until no call is left, and tell how all ended. Raises TimeoutError."""
        deadline_s = time.monotonic() + IDLE_TIMEOUT_S
        while True:
            tallies = self.tallies()
            if not any(tally.open for tally in tallies):
                return tallies
            if time.monotonic() > deadline_s:
                raise TimeoutError(f"calls hang: {tallies}")
            time.sleep(0.1)

    def close(self) -> None:
        """End all."""
        self._owned.close()
