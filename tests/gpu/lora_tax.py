"""Measures what adapters cost on a GPU, what settings change, and what the gateway adds.

    PYTHONPATH=.:clients/python python tests/gpu/lora_tax.py [--tiny] --parts tune,sweep
    PYTHONPATH=.:clients/python python tests/gpu/lora_tax.py [--tiny] --parts serve

Llama-3.1-8B's shape with weights that vLLM makes up, 8 adapters of random weights, 128 tokens
asked and 128 answered, no prefix caching. Needs no network; `serve` needs h2load on PATH.

    tune    configurations of the LoRA kernels for this GPU, kept in --tuned (`lora_kernels.py`)
    sweep   a bare engine for each setting, with 16 of the 32 layers; then kernels by time
    serve   all layers: bare engine, gateway, and vLLM's HTTP server, in turns
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tests.gpu import kernel_times
from tests.gpu.lend import offer_plugin
from tests.gpu.measured_engine import (
    QUICK_SIZES,
    ROOT,
    BareEngine,
    EngineSpec,
    Load,
    prepare_environment,
)
from tests.gpu.measured_server import MeasuredGateway, MeasuredHttp
from tests.gpu.random_adapters import write_adapters
from tests.gpu.random_llama import write_shape
from tests.gpu.turns import Turns, say

GIB = 1024**3
ADAPTERS, TOKENS = 8, 128
PROMPT = tuple(3 + (at * 131) % 990 for at in range(128))
SWEEP_ENGINE_GIB, SERVE_ENGINE_GIB, SPARE_GIB = 17.5, 37.5, 3.0
SKIPPED_STEPS, PROFILED_STEPS = 70, 10
OVER_BARE, OVER_BASE = 0.98, 0.75


@dataclass(frozen=True, slots=True)
class Setting:
    """One way to start an engine with adapters."""

    engine: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    rank: int = 32
    """Of the adapters."""
    tuned: bool = False
    """Whether it has the configurations of `tune`."""


DUAL = {"VLLM_LORA_ENABLE_DUAL_STREAM": "1"}
SETTINGS = {
    "today": Setting(),
    "tuned": Setting(tuned=True),
    "no-adapters": Setting({"enable_lora": False}),
    "specialised": Setting({"specialize_active_lora": True}),
    "dual-stream": Setting(environment=DUAL),
    "tuned-dual": Setting(environment=DUAL, tuned=True),
    "batch-8192": Setting({"max_num_batched_tokens": 8192}),
    "graphs-2048": Setting(
        {"compilation_config": {"cudagraph_capture_sizes": [*QUICK_SIZES, 768, 1024, 1536, 2048]}}
    ),
    "cap-64": Setting({"max_lora_rank": 64}),
    "slots-16": Setting({"max_loras": 16}),
    "rank16-cap-32": Setting(rank=16),
    "rank16-cap-16": Setting({"max_lora_rank": 16}, rank=16),
    "slots-4": Setting({"max_loras": 4}),
}


def main() -> None:
    """All parts that are asked for."""
    options = _options()
    deadline_s = time.monotonic() + options.limit_s
    with tempfile.TemporaryDirectory(prefix="lora-tax-") as name:
        folder = Path(name)
        if not options.tiny:
            offer_plugin(folder)
        prepare_environment(cpu=options.tiny)
        turns = Turns(deadline_s)
        for part in options.parts:
            say(f"part {part}")
            if part == "tune":
                _tune(options)
            elif part == "sweep":
                _sweep(options, folder, turns)
            else:
                _serve(options, folder, turns)
            turns.write(options.json)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure the tax of adapters on a GPU.")
    parser.add_argument("--tiny", action="store_true", help="a try: a small model on the CPU")
    parser.add_argument("--parts", default="tune,sweep")
    parser.add_argument("--settings", default=",".join(SETTINGS), help="of the sweep, in order")
    parser.add_argument("--tuned", type=Path, default=Path(tempfile.gettempdir()) / "tuned")
    parser.add_argument("--tune-s", type=float, default=150)
    parser.add_argument("--layers", type=int, default=16, help="of the sweep's model")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--workers", type=int, default=1, help="of the gateway")
    parser.add_argument("--rank", type=int, default=32, help="of the adapters that are served")
    parser.add_argument("--engine", type=json.loads, default={}, help="JSON: more for `serve`")
    parser.add_argument("--env", type=json.loads, default={}, help="JSON: the same")
    parser.add_argument("--http", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--limit-s", type=float, default=540, help="no measurement after that")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    options = parser.parse_args()
    options.parts = options.parts.split(",")
    options.settings = options.settings.split(",")
    options.in_flight = (8, 16, 32) if options.tiny else (64, 256, 512)
    options.adapters = 2 if options.tiny else ADAPTERS
    options.tokens = 8 if options.tiny else TOKENS
    return options


def _tune(options: argparse.Namespace) -> None:
    if options.tiny:
        say("there are no such kernels on a CPU")
        return
    command = [sys.executable, "-m", "tests.gpu.lora_kernels", "--out", str(options.tuned)]
    limit = ["--limit-s", str(options.tune_s)]
    subprocess.run([*command, *limit], cwd=ROOT, timeout=options.tune_s + 150, check=False)


# --- sweep ----------------------------------------------------------------------------------


def _sweep(options: argparse.Namespace, folder: Path, turns: Turns) -> None:
    model = write_shape(
        folder / "few-layers", tiny=options.tiny, layers=None if options.tiny else options.layers
    )
    chosen = {name: SETTINGS[name] for name in options.settings}
    adapters = {
        rank: write_adapters(folder / "few", model, count=options.adapters, rank=rank)
        for rank in {setting.rank for setting in chosen.values()}
    }
    at_once = 1 if options.tiny else int((_gpu_gib() - SPARE_GIB) // SWEEP_ENGINE_GIB)
    names = list(chosen)
    say(f"{len(names)} settings, {at_once} engines at once")
    while names and not turns.over:
        batch, names = names[:at_once], names[at_once:]
        _measure_settings(options, folder, turns, model, adapters, {n: chosen[n] for n in batch})
    few, many = options.in_flight[0], options.in_flight[1]
    say("medians")
    turns.table()
    for in_flight in (few, many):
        without = turns.median(f"no-adapters, base at {in_flight}")
        base = turns.median(f"today, base at {in_flight}")
        turns.ratio(f"base alone at {in_flight}, where adapters may come : not", base, without)
    for name in chosen:
        if not chosen[name].engine.get("enable_lora", True):
            continue
        base = turns.median(f"{name}, base at {many}") or turns.median(f"today, base at {many}")
        with_adapters = turns.median(f"{name}, adapters at {many}")
        turns.ratio(f"{name} at {many}, adapters : base alone", with_adapters, base)
        for in_flight in (few, many):
            turns.ratio(
                f"{name} at {in_flight}, adapters : today",
                turns.median(f"{name}, adapters at {in_flight}"),
                turns.median(f"today, adapters at {in_flight}"),
            )


def _measure_settings(
    options: argparse.Namespace,
    folder: Path,
    turns: Turns,
    model: Path,
    adapters: Mapping[int, Sequence[Path]],
    settings: Mapping[str, Setting],
) -> None:
    few, many = options.in_flight[0], options.in_flight[1]
    # Unary, so that the front end is not the limit: few layers are fast.
    load = Load(many, 2, PROMPT, options.tokens, stream=False)
    engines = {}
    for name, setting in settings.items():
        traces = folder / "traces" / name
        traces.mkdir(parents=True)
        lora = setting.engine.get("enable_lora", True)
        # Without adapters vLLM compiles on a CPU too, which is turned off there.
        eager = {"enforce_eager": True} if options.tiny and not lora else {}
        spec = EngineSpec(
            model,
            _dtype(options),
            adapters[setting.rank] if lora else (),
            {**_engine(options, 4.5), **_profiled(traces), **eager, **setting.engine},
            {**setting.environment, **_tuned(options, setting.tuned)},
        )
        engines[name] = BareEngine(name, spec, folder / f"{name}.log")
    cells: dict[str, Callable[[], float]] = {}
    try:
        for name, engine in engines.items():
            try:
                say(f"{name} ready after {engine.wait_ready():.0f} s")
                loads = _loads(options, name, load, few, settings[name])
                for each in loads.values():
                    engine.round(replace(each, waves=1))  # warms up
            except Exception as error:
                say(f"FAILED {error}")
                continue
            cells |= {
                what: lambda engine=engine, each=each: engine.round(each)  # type: ignore[misc]
                for what, each in loads.items()
            }
        turns.run(cells, options.rounds)
        for name, engine in engines.items():
            if name in ("today", "tuned") and f"{name}, adapters at {many}" in turns.figures:
                _profile(options, engine, load, folder / "traces" / name)
    finally:
        for engine in engines.values():
            engine.close()


def _loads(
    options: argparse.Namespace, name: str, load: Load, few: int, setting: Setting
) -> dict[str, Load]:
    loads = {
        f"{name}, base at {load.in_flight}": load,
        f"{name}, base at {few}": replace(load, in_flight=few),
    }
    if setting.engine.get("enable_lora", True):
        loads |= {
            f"{name}, adapters at {load.in_flight}": replace(load, adapters=options.adapters),
            f"{name}, adapters at {few}": replace(load, adapters=options.adapters, in_flight=few),
        }
    return loads


def _profile(options: argparse.Namespace, engine: BareEngine, load: Load, traces: Path) -> None:
    skip = 2 if options.tiny else SKIPPED_STEPS
    steps = 2 if options.tiny else PROFILED_STEPS
    for adapters in (0, options.adapters):
        known = {*traces.iterdir()}
        what = f"{engine.name} with {adapters} adapters at {load.in_flight}, decoding"
        try:
            engine.profile(replace(load, adapters=adapters, waves=1), skip=skip, steps=steps)
            trace = kernel_times.newest(traces, known)
            if trace is None:
                say(f"{what}: no trace in {sorted(path.name for path in traces.iterdir())}")
            else:
                kernel_times.show(what, trace, steps)
        except Exception as error:
            say(f"FAILED profile: {error}")


# --- serve ----------------------------------------------------------------------------------


def _serve(options: argparse.Namespace, folder: Path, turns: Turns) -> None:
    model = write_shape(folder / "model", tiny=options.tiny)
    adapters = write_adapters(folder / "all", model, count=options.adapters, rank=options.rank)
    say("adapters written")
    spec = EngineSpec(
        model,
        _dtype(options),
        adapters,
        {"max_num_seqs": 512, **_engine(options, 15.5), **options.engine},
        {**options.env, **_tuned(options, options.tuned.is_dir())},
    )
    os.environ.update(spec.environment)  # the gateway inherits it
    gateway_flags = ["--max-num-seqs", "512"]
    bare = BareEngine("bare", spec, folder / "bare.log")
    servers: dict[str, MeasuredGateway | MeasuredHttp] = {}

    def start_gateway() -> None:
        servers["gateway"] = MeasuredGateway(
            "gateway", spec, options.workers, gateway_flags, folder / "gateway"
        )

    def start_http() -> None:
        flags = ["--max-loras", str(ADAPTERS), "--max-lora-rank", str(options.rank)]
        servers["http"] = MeasuredHttp("http", spec, flags, folder / "http")

    try:
        say(f"bare ready after {bare.wait_ready():.0f} s")
        all_fit = options.tiny or _gpu_gib() > 3 * SERVE_ENGINE_GIB + SPARE_GIB
        start_gateway()
        if options.http and all_fit and not options.tiny:
            start_http()
        _serve_turns(options, turns, bare, servers)
        if options.http and "http" not in servers:
            for server in servers.values():
                server.close()
            servers.clear()
            start_http()
            _serve_turns(options, turns, bare, servers)
    finally:
        bare.close()
        for server in servers.values():
            server.close()
    say("medians")
    turns.table()
    for in_flight in options.in_flight:
        at = f"at {in_flight}"
        gateway = turns.median(f"gateway, adapters {at}")
        base = turns.median(f"bare, base {at}")
        only = in_flight == options.in_flight[1]
        for what, over, under, target in (
            ("gateway : bare, adapters", gateway, turns.median(f"bare, adapters {at}"), OVER_BARE),
            ("gateway with adapters : bare base alone", gateway, base, OVER_BASE),
            ("bare with adapters : base alone", turns.median(f"bare, adapters {at}"), base, 0),
            ("gateway : HTTP, adapters", gateway, turns.median(f"http, adapters {at}"), 0),
        ):
            turns.ratio(f"{what} {at}", over, under, target if only else 0)


def _serve_turns(
    options: argparse.Namespace,
    turns: Turns,
    bare: BareEngine,
    servers: dict[str, MeasuredGateway | MeasuredHttp],
) -> None:
    for name, server in list(servers.items()):
        try:
            say(f"{name} ready after {server.wait_ready():.0f} s")
        except Exception as error:
            say(f"FAILED {error}")
            servers.pop(name).close()
    few, many, most = options.in_flight
    load = Load(many, 1, PROMPT, options.tokens, options.adapters)
    warm = {name: lambda server=server: server.round(load) for name, server in servers.items()}
    Turns(time.monotonic() + 60).run({"bare": lambda: bare.round(load), **warm}, 1)
    for in_flight, rounds in ((many, options.rounds + 1), (few, options.rounds), (most, 2)):
        each = replace(load, waves=2, in_flight=in_flight)
        base = replace(each, adapters=0)
        at = f"at {in_flight}"
        cells: dict[str, Callable[[], float]] = {
            f"bare, base {at}": lambda base=base: bare.round(base),  # type: ignore[misc]
            f"bare, adapters {at}": lambda each=each: bare.round(each),  # type: ignore[misc]
        }
        for name, server in servers.items():
            cells[f"{name}, adapters {at}"] = lambda server=server, each=each: (  # type: ignore[misc]
                server.round(each)
            )
        turns.run(cells, rounds)


# --- for both -------------------------------------------------------------------------------


def _dtype(options: argparse.Namespace) -> str:
    return "float32" if options.tiny else "bfloat16"


def _engine(options: argparse.Namespace, cache_gib: float) -> dict[str, Any]:
    """Weights are made up, and the size of the cache is told: no profile of the memory, so that
    several can start at once."""
    made_up = {"load_format": "dummy", "enable_prefix_caching": False}
    on_gpu = {
        "kv_cache_memory_bytes": int(cache_gib * GIB),
        "gpu_memory_utilization": 0.1,
        "compilation_config": {"cudagraph_capture_sizes": [*QUICK_SIZES]},
    }
    return {**made_up, **({} if options.tiny else on_gpu)}


def _profiled(traces: Path) -> dict[str, Any]:
    profiler = {
        "profiler": "torch",
        "torch_profiler_dir": str(traces),
        "torch_profiler_with_stack": False,
        "ignore_frontend": True,
    }
    return {"profiler_config": profiler}


def _tuned(options: argparse.Namespace, wanted: bool) -> dict[str, str]:
    return {"VLLM_TUNED_CONFIG_FOLDER": str(options.tuned)} if wanted else {}


def _gpu_gib() -> float:
    command = ["nvidia-smi", "--id=0", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout) / 1024


if __name__ == "__main__":
    main()
