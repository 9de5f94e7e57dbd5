"""What the gateway costs, and what vLLM's own front ends do: throughput and time to first token.

Starts all sides on this machine, with the same engine options: the bare engine in process, this
gateway, vLLM's HTTP server, and its Rust front end where it is installed. Measures them in turns,
and prints tables with the targets. The exit code is 0 whenever it could measure: a missed target
is printed as missed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

from engine.models import resolve_model
from gateway.settings import Settings
from tests.bench.bare import ADAPTER_RANK, BareSide, engine_options
from tests.bench.comparison import (
    FirstTokens,
    Throughput,
    compare_first_tokens,
    compare_throughput,
)
from tests.bench.front_end import FrontEnd, Kind
from tests.bench.h2load import PACKAGE, h2load_found
from tests.bench.machine import Machine
from tests.bench.peer import (
    PeerSide,
    find_rust_front_end,
    peer_arguments,
    peer_environment,
    rust_environment,
)
from tests.bench.report import Report
from tests.bench.served import ServedSide
from tests.bench.side import Side
from tests.bench.verdict import MANY
from tests.bench.workload import ADAPTER, Prompt, Workload

TOKENS = 32
REQUESTS = {1: 24, 32: 256, MANY: 512}
"""Requests of a round by how many are in flight; a round takes one to three seconds."""
BLOCKS, BLOCK_REQUESTS, BLOCK_TOKENS = 10, 25, 8
"""Of the time to first token: the stream goes on a little after it."""
TOKEN_IDS = tuple(range(100, 108))
"""Few, because on a CPU the adapter costs the engine as much for each of these as for each token
that it generates."""
TEXT = "The river rose in the night, and in the morning the bridge was gone."
FIRST_TOKENS: dict[str, tuple[Prompt, str]] = {
    "token ids": (TOKEN_IDS, ""),
    "text": (TEXT, ""),
    "token ids, one adapter": (TOKEN_IDS, ADAPTER),
}
"""Prompt and adapter of each column of that table."""
ENGINE_FLAGS = (
    *("--max-model-len", "2048", "--gpu-memory-utilization", "0.2", "--cpu-kv-cache-gib", "1"),
    *("--max-lora-rank", f"{ADAPTER_RANK}"),
)
"""All engines share the memory of the machine, or of a GPU. vLLM's kernels for the CPU copy all
weights of an adapter for each token, with zeros up to the highest rank: at 32 a core gave 44
requests a second, and front ends could not be told apart."""


def main() -> None:
    """Entry of the command."""
    options = _options()
    if not h2load_found():
        sys.exit(f"bench: h2load is not installed, which drives all sides (Debian: {PACKAGE})")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("bench: ended by a signal"))
    machine = Machine.here()
    with tempfile.TemporaryDirectory(prefix="bench-") as folder, ExitStack() as owned:
        report = _measure(machine, Path(folder), owned, options)
    print(report.text())
    if options.json is not None:
        options.json.write_text(json.dumps(report.raw(), indent=1) + "\n")


def _measure(
    machine: Machine, folder: Path, owned: ExitStack, options: argparse.Namespace
) -> Report:
    sides, served = _start(folder, owned, options)
    throughputs = [
        _throughput(sides, workload, options.rounds) for workload in _workloads(options.quick)
    ]
    # Two ways into one engine do not differ in this.
    alone = [side for side in sides if side.kind != Kind.ADD_REQUEST]
    blocks = 4 if options.quick else BLOCKS
    return Report(
        machine=machine,
        model=options.model,
        dtype=options.dtype,
        workers=options.workers,
        connections=served.connections,
        throughputs=throughputs,
        first_tokens=[_first_tokens(alone, name, blocks) for name in FIRST_TOKENS],
        absent=_absent(sides),
    )


def _start(
    folder: Path, owned: ExitStack, options: argparse.Namespace
) -> tuple[Sequence[FrontEnd], ServedSide]:
    """All sides. The bare one is first, since it makes what the others need."""
    flags = ["--model", options.model, "--dtype", options.dtype, *ENGINE_FLAGS]
    adapter = folder / "adapter"
    _say("starting the bare engine")
    arguments = [str(folder / "state"), str(adapter), *flags]
    bare = Side("tests.bench.bare", arguments, folder / "bare.log")
    owned.callback(bare.close)
    told = bare.wait_ready()
    _say("starting the gateway")
    served = ServedSide(folder, adapter, flags, options.workers)
    owned.callback(served.close)
    settings = Settings.from_argv([*flags, "--state-dir", str(folder / "state")])
    model_path = resolve_model(settings.model, settings.state_dir)
    peer = peer_arguments(engine_options(settings, model_path), **told)
    environment = peer_environment(folder, settings.cpu_kv_cache_gib)
    environments = {Kind.PYTHON_HTTP: environment}
    if (binary := find_rust_front_end()) is not None:
        environments[Kind.RUST_HTTP] = environment | rust_environment(binary)
    peers = []
    for kind, environment in environments.items():
        _say(f"starting {kind}")
        peers.append(PeerSide(kind, folder, adapter, peer, environment))
        owned.callback(peers[-1].close)
    ways = (BareSide(bare, kind) for kind in (Kind.GENERATE, Kind.ADD_REQUEST))
    return [*ways, served, *peers], served


def _workloads(quick: bool) -> Iterator[Workload]:
    for streaming, adapter in itertools.product((True, False), (ADAPTER, "")):
        for in_flight, requests in REQUESTS.items():
            if not quick or in_flight == MANY:
                yield Workload(TOKEN_IDS, adapter, requests, in_flight, TOKENS, streaming)


def _throughput(sides: Sequence[FrontEnd], workload: Workload, rounds: int) -> Throughput:
    measured = compare_throughput(sides, workload, rounds)
    _say(
        f"{'streaming' if workload.streaming else 'unary'}, "
        f"{'one' if workload.adapter else 'no'} adapter, {workload.in_flight} in flight: "
        + ", ".join(f"{kind} {measured.median(kind):.1f}/s" for kind in measured.requests_per_s)
    )
    return measured


def _first_tokens(sides: Sequence[FrontEnd], name: str, blocks: int) -> FirstTokens:
    _say(f"time to first token: {name}")
    prompt, adapter = FIRST_TOKENS[name]
    workload = Workload(prompt, adapter, BLOCK_REQUESTS, 1, BLOCK_TOKENS)
    return compare_first_tokens(name, sides, workload, blocks)


def _absent(sides: Sequence[FrontEnd]) -> dict[Kind, str]:
    absent = {
        side.kind: f"without the adapter, since it did not load it: {side.refused_adapter}"
        for side in sides
        if isinstance(side, PeerSide) and side.refused_adapter
    }
    if not any(side.kind == Kind.RUST_HTTP for side in sides):
        absent[Kind.RUST_HTTP] = "not installed; `make bench` does that"
    return absent


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("--model", default="tiny-1layer", help="as for `gateway serve`")
    parser.add_argument("--dtype", default="float32", help="as for `gateway serve`")
    parser.add_argument("--workers", type=int, default=1, help="of the gateway")
    parser.add_argument("--rounds", type=int, default=5, help="of each case and side, at least 3")
    parser.add_argument(
        "--quick", action="store_true", help=f"only with {MANY} in flight, and few first tokens"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    options = parser.parse_args()
    if options.rounds < 3:
        parser.error("--rounds must be at least 3, for a median that one bad round does not make")
    return options


def _say(what: str) -> None:
    print(f"bench: {what}", flush=True)


if __name__ == "__main__":
    main()
