"""Measures the hot path on a host with a GPU: a tiny model, so that the host is the limit.

    PYTHONPATH=.:clients/python python tests/gpu/hot_path.py [--cpu]

Bare AsyncLLMs on one core, one to four of them, against gateways of as many workers, each on a
core of its own; all are up at once and measured in turns. Needs no network, and h2load on PATH.
Figures are printed as they come, and at the end medians and ratios.
"""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from engine.models import resolve_model
from tests.gpu.lend import offer_plugin
from tests.gpu.measured_engine import (
    QUICK_SIZES,
    ROOT,
    BareEngine,
    EngineSpec,
    Load,
    prepare_environment,
)
from tests.gpu.measured_server import MeasuredGateway
from tests.gpu.turns import Turns, say
from tests.tiny_adapter import write_tiny_adapter

TARGET = 0.9
CHUNK = 8
"""Tokens per message of those who do not want each by itself."""
WITHOUT = " without our plugin"
FLAGS = ("--max-num-seqs", "512")
EDGE_S = 150.0


def main() -> None:
    """Entry of the command."""
    options = _options()
    begun_s = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="hot-path-") as name:
        folder = Path(name)
        if not options.cpu:
            offer_plugin(folder)
        prepare_environment(cpu=options.cpu)
        model = resolve_model("tiny", folder / "state")
        adapter = write_tiny_adapter(folder / "adapter", model, seed=1, rank=8)
        turns = Turns(begun_s + options.limit_s)
        _measure(options, folder, model, adapter, turns)
    _report(options, turns)
    turns.write(options.json)
    if options.edge and importlib.util.find_spec("tests.bench.edge") is not None:
        say("the edge on fake shards")
        command = [sys.executable, "-m", "tests.bench.edge"]
        subprocess.run(command, cwd=ROOT, timeout=EDGE_S, check=False)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure the hot path against bare AsyncLLM.")
    parser.add_argument("--cpu", action="store_true", help="a try: a few requests, on the CPU")
    parser.add_argument("--workers", default="1,2,4", help="one gateway for each")
    parser.add_argument("--front-ends", default="1,2,4", help="of bare AsyncLLM, on one core")
    parser.add_argument(
        "--stock",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="one more bare engine, without what the gateway adds to vLLM's core",
    )
    parser.add_argument("--in-flight", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--waves", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--limit-s", type=float, default=540, help="no measurement after that")
    parser.add_argument("--edge", action="store_true", help="and `tests.bench.edge` behind it")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    options = parser.parse_args()
    options.workers = [int(count) for count in options.workers.split(",") if count]
    options.front_ends = [int(count) for count in options.front_ends.split(",") if count]
    return options


def _measure(
    options: argparse.Namespace, folder: Path, model: Path, adapter: Path, turns: Turns
) -> None:
    # Without this, starts at the same time would disturb each other's memory profiles.
    on_gpu = {
        "kv_cache_memory_bytes": 3 * 1024**3,
        "gpu_memory_utilization": 0.1,
        "compilation_config": {"cudagraph_capture_sizes": [*QUICK_SIZES]},
    }
    dtype = "float32" if options.cpu else "bfloat16"
    spec = EngineSpec(
        model,
        dtype,
        [adapter],
        {"max_num_seqs": 512, **({} if options.cpu else on_gpu)},
        front_ends=max(options.front_ends, default=1),
    )
    bare = BareEngine("bare", spec, folder / "bare.log")
    stock: BareEngine | None = None
    gateways: dict[int, MeasuredGateway] = {}
    try:
        # Alone, because it compiles what the others then find in the cache.
        say(f"bare engine ready after {bare.wait_ready():.0f} s")
        if options.stock:
            plain = replace(spec, environment={"VLLM_PLUGINS": ""})
            stock = BareEngine("bare without our plugin", plain, folder / "stock.log")
            if options.cpu:
                stock.wait_ready()
        for count in options.workers:
            gateways[count] = MeasuredGateway(
                f"gateway, {count} workers", spec, count, FLAGS, folder / f"gateway-{count}"
            )
            if options.cpu:
                gateways[count].wait_ready()
        if stock is not None and not options.cpu:
            stock.wait_ready()
        for count, gateway in list(gateways.items()):
            try:
                say(f"{gateway.name} ready after {gateway.wait_ready():.0f} s")
            except Exception as error:
                say(f"FAILED {error}")
                gateways.pop(count).close()
        load = Load(options.in_flight, 1, tuple(range(100, 132)), min(32, options.tokens), 1)
        cells = _cells(options, load, bare, stock, gateways)
        Turns(time.monotonic() + 60).run(cells, 1)  # warms up
        say("warm; now in turns")
        load = replace(load, tokens=options.tokens, waves=options.waves)
        turns.run(_cells(options, load, bare, stock, gateways), options.rounds)
        _processor_time(options, load, gateways)
    finally:
        bare.close()
        if stock is not None:
            stock.close()
        for gateway in gateways.values():
            gateway.close()


def _cells(
    options: argparse.Namespace,
    load: Load,
    bare: BareEngine,
    stock: BareEngine | None,
    gateways: dict[int, MeasuredGateway],
) -> dict[str, Callable[[], float]]:
    """All that is measured, by name."""
    streams = replace(load, adapters=0)
    unary = replace(streams, stream=False)
    chunks = replace(streams, tokens_per_delta=CHUNK)
    adapter = replace(load, adapters=1)
    cells: dict[str, Callable[[], float]] = {}
    for count in options.front_ends:
        few = count in (min(options.front_ends), max(options.front_ends))
        for what, each in {
            "streaming": streams,
            **({"unary": unary, "adapter streaming": adapter} if few else {}),
        }.items():
            cells[f"{what}, bare {count}"] = lambda each=each, count=count: (  # type: ignore[misc]
                bare.round(each, count)
            )
    most = max(options.front_ends)
    if stock is not None:
        cells[f"streaming, bare {most}{WITHOUT}"] = lambda: stock.round(streams, most)
    for count, gateway in gateways.items():
        for what, each in {
            "streaming": streams,
            f"streaming by {CHUNK}": chunks,
            "unary": unary,
            "adapter streaming": adapter,
        }.items():
            cells[f"{what}, gateway {count}"] = lambda each=each, gateway=gateway: (  # type: ignore[misc]
                gateway.round(each)
            )
    return cells


def _processor_time(
    options: argparse.Namespace, load: Load, gateways: dict[int, MeasuredGateway]
) -> None:
    """What the workers' loops have to do for a token: says whether they are the limit."""
    streams = replace(load, adapters=0)
    for gateway in gateways.values():
        before, begun_s = gateway.processor_s(), time.monotonic()
        try:
            gateway.round(streams)
        except Exception as error:
            say(f"FAILED {gateway.name}: {error}")
            continue
        took_s, after = time.monotonic() - begun_s, gateway.processor_s()
        spent = {name: after[name] - before[name] for name in before}
        say(
            f"{gateway.name}: workers {1e6 * spent['workers'] / streams.all_tokens:.1f} us a token"
            f", busy {spent['workers'] / took_s:.2f} processors, all its processes "
            f"{spent['all'] / took_s:.2f}"
        )


def _report(options: argparse.Namespace, turns: Turns) -> None:
    say("medians")
    turns.table()
    bare = {
        what: turns.best(*(name for name in turns.figures if name.startswith(f"{what}, bare ")))
        for what in ("streaming", "unary", "adapter streaming")
    }
    """The best that anybody got from a core, our plugin in it or not."""
    for what, ceiling in {**bare, f"streaming by {CHUNK}": bare["streaming"]}.items():
        for count in options.workers:
            over = turns.median(f"{what}, gateway {count}")
            turns.ratio(f"{what}, gateway with {count} workers : best bare", over, ceiling)
    most = f"streaming, bare {max(options.front_ends)}"
    without = turns.median(f"{most}{WITHOUT}")
    turns.ratio(f"{most}, without our plugin : with it", without, turns.median(most))
    best = turns.best(*(f"streaming, gateway {count}" for count in options.workers))
    turns.ratio("streaming, best gateway : best bare", best, bare["streaming"], TARGET)


if __name__ == "__main__":
    main()
