"""What the gateway costs: throughput and time to first token against the bare engine.

Starts both sides on this machine, measures them in turns, and prints two tables. The exit
code is 0 whenever it could measure: a missed target is printed as missed.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from tests.bench.comparison import compare_first_tokens, compare_throughput
from tests.bench.machine import Machine
from tests.bench.report import Report
from tests.bench.served import ServedSide
from tests.bench.side import Side
from tests.bench.workload import ADAPTER, Prompt, Workload

IN_FLIGHT, TOKENS = 64, 64
ROUND_REQUESTS = 256
"""Streams of a round; that takes a few seconds on two cores."""
BLOCKS, BLOCK_REQUESTS, BLOCK_TOKENS = 10, 25, 8
"""Of the time to first token: the stream goes on a little after it."""
TOKEN_IDS = tuple(range(100, 132))
TEXT = "The river rose in the night, and in the morning the bridge was gone."
CASES: dict[str, tuple[Prompt, str]] = {
    "base model, token ids": (TOKEN_IDS, ""),
    "base model, text": (TEXT, ""),
    "one adapter, token ids": (TOKEN_IDS, ADAPTER),
}
"""Prompt and adapter of each line of the tables."""
ENGINE_FLAGS = ("--max-model-len", "2048", "--gpu-memory-utilization", "0.4")
"""Two engines share the memory of a GPU. A CPU engine ignores it."""


def main() -> None:
    """Entry of the command."""
    options = _options()
    flags = ["--model", options.model, "--dtype", options.dtype, *ENGINE_FLAGS]
    machine = Machine.here()
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        report = _measure(machine, Path(folder), flags, options)
    print(report.text())
    if options.json is not None:
        options.json.write_text(json.dumps(report.raw(), indent=1) + "\n")


def _measure(
    machine: Machine, folder: Path, flags: list[str], options: argparse.Namespace
) -> Report:
    adapter = folder / "adapter"
    _say("starting the bare engine")
    arguments = [str(folder / "state"), str(adapter), *flags]
    bare = Side("tests.bench.bare", arguments, folder / "bare.log")
    try:
        bare.wait_ready()
        _say("starting the gateway")
        served = ServedSide(folder, adapter, flags)
        try:
            throughputs, first_tokens = [], []
            for name, (prompt, lora) in CASES.items():
                _say(f"throughput: {name}")
                workload = Workload(prompt, lora, ROUND_REQUESTS, IN_FLIGHT, TOKENS)
                limits = {"rounds": options.rounds, "limit_s": options.limit_s}
                throughputs.append(compare_throughput(name, workload, bare, served, **limits))
            for name, (prompt, lora) in CASES.items():
                _say(f"time to first token: {name}")
                workload = Workload(prompt, lora, BLOCK_REQUESTS, 1, BLOCK_TOKENS)
                limits = {"blocks": BLOCKS, "limit_s": options.limit_s}
                first_tokens.append(compare_first_tokens(name, workload, bare, served, **limits))
        finally:
            served.close()
    finally:
        bare.close()
    return Report(machine, options.model, options.dtype, served.load, throughputs, first_tokens)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("--model", default="tiny-1layer", help="as for `gateway serve`")
    parser.add_argument("--dtype", default="float32", help="as for `gateway serve`")
    parser.add_argument("--rounds", type=int, default=9, help="pairs of rounds, at least 5")
    parser.add_argument("--limit-s", type=float, default=45, help="about, per line of a table")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    return parser.parse_args()


def _say(what: str) -> None:
    print(f"bench: {what}", flush=True)


if __name__ == "__main__":
    main()
