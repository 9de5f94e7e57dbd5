"""What adapters cost a worker in metrics, once all of them have been called: memory, file, scrape.

Two processes record the same calls as a worker does: one names every adapter in its labels, as it
was once, the other as many as the gateway names. Each adapter has unary calls and streams, and a
few that fail. No gateway and no engine runs.

    python -m tests.bench.labels
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.bench.machine import Machine

ROOT = Path(__file__).parents[2]
SCRAPES = 3
TIMEOUT_S = 900.0


@dataclass(frozen=True, slots=True)
class Cost:
    """Of all calls, over a process that has recorded none."""

    memory_bytes: int
    """Unique set size of the worker: what its end would free."""
    file_bytes: int
    """Used by its values, on the memory file system or disk of the temporary folder."""
    scrape_s: float
    """To add its files up and write the page, the fastest of SCRAPES; in the host."""
    series: int
    """Lines of the page."""
    record_us: float
    """To record one call, where its adapter was called before."""


def main() -> None:
    """Entry of the command."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.labels", description=__doc__)
    parser.add_argument("--adapters", type=int, default=10_000)
    parser.add_argument("--named", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.named is not None:
        print(json.dumps(_record(options.adapters, options.named)))
        return
    from gateway.adapter_labels import MAX_NAMED, MAX_NAMES_GIVEN

    print(Machine.here())
    print(f"{options.adapters:,} adapters, each called 5 times: what that costs one worker")
    for what, named in (
        ("every one named", options.adapters),
        (f"{MAX_NAMED} named", MAX_NAMED),
        (f"{MAX_NAMES_GIVEN} named, the most in a gateway's life", MAX_NAMES_GIVEN),
    ):
        cost = _measure(options.adapters, named)
        memory_mib, files_mib = cost.memory_bytes / 2**20, cost.file_bytes / 2**20
        print(
            f"  {what:<44}{memory_mib:8.1f} MiB  files {files_mib:6.1f} MiB  "
            f"{cost.series:>8,} series  scrape {cost.scrape_s:6.3f} s  "
            f"a call {cost.record_us:.1f} us",
            flush=True,
        )


def _measure(adapters: int, named: int) -> Cost:
    with tempfile.TemporaryDirectory(prefix="bench-labels-") as folder:
        environment = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": folder}
        command = [sys.executable, "-m", "tests.bench.labels", "--adapters", str(adapters)]
        done = subprocess.run(
            [*command, "--named", str(named)],
            env=environment,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            check=True,
            timeout=TIMEOUT_S,
        )
        return Cost(**json.loads(done.stdout))


def _record(adapters: int, named: int) -> dict[str, float]:
    """In a process of its own, which is a worker first and the host then."""
    from prometheus_client import CollectorRegistry, generate_latest
    from prometheus_client.multiprocess import MultiProcessCollector

    from engine.ring import AdapterKey
    from gateway import metrics
    from gateway.adapter_labels import AdapterLabels
    from gateway.call import Call

    def call(number: int, method: str, code: str) -> None:
        made = Call(method, task=None, started_s=0.0)
        made.adapter_label = labels.of(keys[number])
        made.prompt_tokens, made.completion_tokens = 10, 20
        if code == "OK":
            made.first_token_s, made.scheduled_s = 0.02, 0.01
        if method == "GenerateStream":
            metrics.observe_itl(made, 0.01)
        metrics.record(made, code, 0.5)

    def calls_of(number: int) -> None:
        for method in ("Generate", "GenerateStream"):
            for code in ("OK", "DEADLINE_EXCEEDED"):
                call(number, method, code)
        call(number, "Generate", "UNAVAILABLE")

    keys = [AdapterKey("default", f"adapter-{number:06}") for number in range(adapters)]
    labels = AdapterLabels(frozenset(keys[:named]))
    process = psutil.Process()
    before_bytes = process.memory_full_info().uss
    for number in range(adapters):
        calls_of(number)
    memory_bytes = process.memory_full_info().uss - before_bytes
    begin_s = time.perf_counter()
    for number in range(min(adapters, 1000)):
        calls_of(number)
    record_us = (time.perf_counter() - begin_s) / (5 * min(adapters, 1000)) * 1e6

    folder = Path(os.environ["PROMETHEUS_MULTIPROC_DIR"])
    registry = CollectorRegistry()
    MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
    scrapes_s = []
    for _ in range(SCRAPES):
        begin_s = time.perf_counter()
        page = generate_latest(registry)
        scrapes_s.append(time.perf_counter() - begin_s)
    return {
        "memory_bytes": memory_bytes,
        "file_bytes": sum(path.stat().st_blocks * 512 for path in folder.iterdir()),
        "scrape_s": min(scrapes_s),
        "series": sum(not line.startswith(b"#") for line in page.splitlines()),
        "record_us": record_us,
    }


if __name__ == "__main__":
    main()
