"""Where the time of a worker goes: py-spy looks into one while it serves.

Starts a gateway on this machine, and for streamed and unary calls, with an adapter and without,
writes a flame graph and a table of the hottest functions into a folder. Only samples that hold the
interpreter's lock count, because that is what bounds a worker, and because threads that wait in
native code look busy to py-spy. Samples are of the clock: whoever is displaced by another process
while it holds the lock looks hot, so leave the machine alone meanwhile.

    python -m tests.bench.profile --seconds 20
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import psutil

from engine.models import resolve_model
from tests.bench.flame_graph import FlameGraph
from tests.bench.h2load import PACKAGE, STREAMING, UNARY, h2load_found, run_h2load
from tests.bench.machine import Machine
from tests.bench.workload import ADAPTER, Workload
from tests.e2e.gateway_process import GatewayProcess
from tests.tiny_adapter import write_tiny_adapter

IN_FLIGHT, TOKENS, ROUND_REQUESTS = 128, 32, 1024
BASE = Workload(tuple(range(100, 132)), "", ROUND_REQUESTS, IN_FLIGHT, TOKENS)
CASES: dict[str, tuple[str, Workload]] = {
    "streaming": (STREAMING, BASE),
    "streaming-adapter": (STREAMING, replace(BASE, adapter=ADAPTER)),
    "unary": (UNARY, BASE),
    "unary-adapter": (UNARY, replace(BASE, adapter=ADAPTER)),
}
WARM_UP_ROUNDS = 2
RATE_HZ = 200
SPY_END_S = 120.0
"""How long py-spy may take to draw, once it has looked."""
SHOWN = 40
PTRACE_SCOPE = Path("/proc/sys/kernel/yama/ptrace_scope")


class NotAllowed(Exception):
    """This machine does not let py-spy look into the worker. The message says what to do."""


class CallsFailed(Exception):
    """Not every call ended with OK."""


@dataclass(frozen=True, slots=True)
class Profile:
    """What one case gave."""

    graph: FlameGraph
    tokens_per_s: float
    """While py-spy looked, which takes some."""
    processor: float
    """Share of one processor that the worker used."""

    def text(self, title: str) -> str:
        """The table."""
        graph = self.graph
        rows = [
            f"{function.self_samples / graph.samples:>7.1%}"
            f"{function.all_samples / graph.samples:>7.1%}  {function.name}"
            for function in graph.functions[:SHOWN]
        ]
        return "\n".join(
            [
                f"{title}: {self.tokens_per_s:,.0f} tokens/s, worker at {self.processor:.0%} of a "
                f"processor, {graph.samples} samples",
                "   self    all  function",
                *rows,
            ]
        )


def main() -> None:
    """Entry of the command."""
    options = _options()
    machine = Machine.here()
    spy = _spy()
    options.folder.mkdir(parents=True, exist_ok=True)
    tables = [str(machine)]
    with tempfile.TemporaryDirectory(prefix="profile-") as folder:
        for table in _profiles(spy, Path(folder), options):
            tables.append(table)
            print(f"\n{table}\n", flush=True)
    (options.folder / "hottest.txt").write_text("\n\n".join(tables) + "\n")
    _say(f"flame graphs (.svg) and these tables (hottest.txt) are in {options.folder}")


def _profiles(spy: str, folder: Path, options: argparse.Namespace) -> Iterator[str]:
    model = resolve_model(options.model, folder / "state")
    adapter = write_tiny_adapter(folder / "adapter", model, seed=1, rank=8)
    flags = ["--model", options.model, "--dtype", options.dtype, "--max-model-len", "2048"]
    flags += ["--adapter", f"{ADAPTER}={adapter}"]
    _say("starting the gateway")
    with closing(GatewayProcess(flags, folder / "state", folder / "gateway.log")) as gateway:
        gateway.wait_serving()
        gateway.wait_standby()
        for name in options.cases or CASES:
            _say(f"{name}, {options.seconds} s")
            svg = options.folder / f"{name}.svg"
            yield _profile(spy, gateway, name, svg, options).text(name)


def _profile(
    spy: str, gateway: GatewayProcess, case: str, svg: Path, options: argparse.Namespace
) -> Profile:
    path, workload = CASES[case]
    (pid,) = gateway.serving_workers()
    worker = psutil.Process(pid)
    for _ in range(WARM_UP_ROUNDS):
        run_h2load(gateway.address, workload, path)
    before, begin_s, used_s = _good_calls(gateway), time.monotonic(), _processor_s(worker)
    native = ["--native"] if options.native else []
    command = [spy, "record", "--pid", f"{pid}", "--output", f"{svg}", "--rate", f"{RATE_HZ}"]
    with subprocess.Popen(
        [*command, "--duration", f"{options.seconds}", "--gil", *native],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as recording:
        rounds = 0
        while time.monotonic() < begin_s + options.seconds and recording.poll() is None:
            run_h2load(gateway.address, workload, path)
            rounds += 1
        spent_s, used_s = time.monotonic() - begin_s, _processor_s(worker) - used_s
        printed, _ = recording.communicate(timeout=SPY_END_S)
    if recording.returncode != 0:
        raise NotAllowed(f"py-spy ended with {recording.returncode}:\n{printed}")
    good = _good_calls(gateway) - before
    if good != rounds * workload.requests:
        raise CallsFailed(f"{good:g} of {rounds * workload.requests} calls ended with OK")
    rate = rounds * workload.requests * workload.tokens / spent_s
    return Profile(FlameGraph.read(svg), rate, used_s / spent_s)


def _good_calls(gateway: GatewayProcess) -> float:
    return sum(gateway.metrics("llm_adapter_requests_total", code="OK"))


def _processor_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


def _spy() -> str:
    """Where py-spy is. Raises NotAllowed where it could not look into a worker."""
    spy = shutil.which("py-spy", path=str(Path(sys.executable).parent)) or shutil.which("py-spy")
    if spy is None:
        raise NotAllowed("py-spy is not installed; `make profile` installs it")
    if not h2load_found():
        raise NotAllowed(f"h2load is not installed (Debian: {PACKAGE})")
    scope = int(PTRACE_SCOPE.read_text()) if PTRACE_SCOPE.exists() else 0
    if scope and os.geteuid() != 0:
        raise NotAllowed(
            f"{PTRACE_SCOPE} is {scope}: only root may look into a process that it has not started "
            "itself. Run this as root, or `sudo sysctl kernel.yama.ptrace_scope=0` for as long"
        )
    return spy


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.profile", description=__doc__)
    parser.add_argument("--model", default="tiny-1layer", help="as for `gateway serve`")
    parser.add_argument("--dtype", default="float32", help="as for `gateway serve`")
    parser.add_argument("--seconds", type=int, default=20, help="of each case")
    parser.add_argument("--cases", nargs="*", choices=tuple(CASES), help="default: all")
    parser.add_argument(
        "--native", action="store_true", help="frames of C and C++ too, and of all threads; slower"
    )
    parser.add_argument("--folder", type=Path, default=Path("build/profile"))
    return parser.parse_args()


def _say(what: str) -> None:
    print(f"profile: {what}", flush=True)


if __name__ == "__main__":
    main()
