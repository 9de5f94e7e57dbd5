"""Finds configurations of vLLM's LoRA kernels for one model's shapes, on the GPU that is here.

    PYTHONPATH=. python -m tests.gpu.lora_kernels --out FOLDER [--limit-s 150]

Writes the files that vLLM reads from VLLM_TUNED_CONFIG_FOLDER (vllm/lora/ops/triton_ops/utils.py,
`load_lora_op_config`): <GPU>_SHRINK.json, <GPU>_EXPAND_TRUE.json and, for the second stream,
<GPU>_EXPAND_FALSE.json, by `max_loras + 1`, slices, rows, k, n. The widths are those of
Llama-3.1-8B. Kernels are timed in a graph, over so many layers that the GPU's cache holds none of
their weights, as in a real step; what is found is compared with torch before it is taken.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch

HIDDEN, INTERMEDIATE, KEYS = 4096, 14_336, 1024
ROWS = (16, 64, 128, 256, 512, 2048)
CACHE_BYTES = 128 * 1024**2
"""More than the L2 of an H100 or H200 (50 MB)."""
REPEATS = 5

Config = dict[str, int | None]


@dataclass(frozen=True, slots=True)
class Shape:
    """One kernel of a layer: its weights' widths."""

    op: str
    slices: tuple[int, ...]
    """Outputs of an expand; one entry for each part of a shrink."""
    width: int
    """Of the layer's input (shrink) or its widest output (expand)."""


SHAPES = (
    Shape("shrink", (0, 0, 0), HIDDEN),  # qkv
    Shape("shrink", (0,), HIDDEN),  # o
    Shape("shrink", (0, 0), HIDDEN),  # gate and up
    Shape("shrink", (0,), INTERMEDIATE),  # down
    Shape("expand", (HIDDEN, KEYS, KEYS), HIDDEN),
    Shape("expand", (HIDDEN,), HIDDEN),  # o and down
    Shape("expand", (INTERMEDIATE, INTERMEDIATE), INTERMEDIATE),
)


def main() -> None:
    """Tune, and write the files."""
    parser = argparse.ArgumentParser(description="Tune vLLM's LoRA kernels.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--max-loras", type=int, default=8)
    parser.add_argument("--ranks", default="32")
    parser.add_argument("--limit-s", type=float, default=150)
    options = parser.parse_args()
    end_s = time.monotonic() + options.limit_s
    options.out.mkdir(parents=True, exist_ok=True)
    ranks = [int(rank) for rank in options.ranks.split(",")]
    for rank in ranks:
        compile_all(rank, options.max_loras, options.adapters)
    print(f"compiled; {end_s - time.monotonic():.0f} s left", flush=True)
    shrinks: dict[str, Any] = {}
    expands: dict[str, Any] = {}
    for rank, shape in product(ranks, SHAPES):
        for rows in ROWS:
            bench = Bench(shape, rows, rank, options.max_loras, options.adapters)
            best, best_us, default_us = bench.search(end_s)
            name = f"{shape.op} x{len(shape.slices)} of {shape.width}, rank {rank}, {rows} rows"
            print(f"{name}: {default_us:.1f} -> {best_us:.1f} us  {best}", flush=True)
            k, n = (shape.width, rank) if shape.op == "shrink" else (rank, shape.width)
            tree = shrinks if shape.op == "shrink" else expands
            for key in (options.max_loras + 1, len(shape.slices), rows, k):
                tree = tree.setdefault(str(key), {})
            tree[str(n)] = best
    gpu = torch.cuda.get_device_name().replace(" ", "_").replace("-", "_")
    for name, found in {
        "SHRINK": shrinks,
        "EXPAND_TRUE": expands,
        "EXPAND_FALSE": expands,
    }.items():
        (options.out / f"{gpu}_{name}.json").write_text(json.dumps(found, indent=1) + "\n")
    print(f"written to {options.out}", flush=True)


def candidates(op: str, rank: int) -> Iterator[Config]:
    """Configurations worth a try beside the default."""
    own = {"num_ctas": 1, "max_nreg": None}
    if op == "shrink":
        for block_m, block_k, split_k, (warps, stages) in product(
            (16, 32, 64), (64, 128, 256), (1, 2, 4, 8, 16, 32), ((4, 3), (2, 4))
        ):
            if block_m * block_k <= 64 * 128:
                yield shrink(block_m, max(16, min(rank, 32)), block_k, split_k, warps, stages)
        return
    for block_m, block_n, warps, stages in product(
        (16, 32, 64, 128), (64, 128, 256), (4, 8), (2, 3)
    ):
        if block_m * block_n <= 128 * 128:
            sizes = {"block_m": block_m, "block_n": block_n, "block_k": max(16, min(rank, 32))}
            yield {**sizes, "num_warps": warps, "num_stages": stages, **own}


def shrink(m: int, n: int, k: int, split_k: int, warps: int, stages: int) -> Config:
    """A configuration of that kernel."""
    blocks = {"block_m": m, "block_n": n, "block_k": k, "split_k": split_k, "group_size_m": 8}
    return {**blocks, "num_warps": warps, "num_stages": stages, "num_ctas": 1, "max_nreg": None}


class Bench:
    """One kernel at one size, in a graph over several layers."""

    def __init__(self, shape: Shape, rows: int, rank: int, max_loras: int, adapters: int) -> None:
        from vllm.lora.ops.triton_ops import lora_kernel_metadata, utils

        # Both are keyed by addresses, which are used again.
        utils._LORA_A_PTR_DICT.clear()
        utils._LORA_B_PTR_DICT.clear()
        self.shape, self.rows, self.rank = shape, rows, rank
        self.meta = lora_kernel_metadata.LoRAKernelMeta.make(max_loras, rows, "cuda")
        self.mapping = torch.arange(rows, device="cuda") % adapters
        self.meta.prepare_tensors(self.mapping)
        outs = shape.slices if shape.op == "expand" else (rank,) * len(shape.slices)
        ins = rank if shape.op == "expand" else shape.width
        layer_bytes = adapters * sum(outs) * ins * 2
        layers = max(2, min(32, -(-CACHE_BYTES // layer_bytes)))
        self.weights = [
            [
                torch.randn(max_loras, 1, out, ins, device="cuda", dtype=torch.bfloat16) / ins**0.5
                for out in outs
            ]
            for _ in range(layers)
        ]
        if shape.op == "shrink":
            self.input = torch.randn(rows, ins, device="cuda", dtype=torch.bfloat16)
            self.output = torch.empty(len(outs), rows, rank, device="cuda")
        else:
            self.input = torch.randn(len(outs), rows, rank, device="cuda")
            self.output = torch.zeros(rows, sum(outs), device="cuda", dtype=torch.bfloat16)

    def search(self, end_s: float) -> tuple[Config, float, float]:
        """The fastest, its time and that of vLLM's default, in microseconds for one launch."""
        default = self.default()
        best, default_us = default, self.time_us(default)
        best_us = default_us
        for config in candidates(self.shape.op, self.rank):
            if time.monotonic() > end_s:
                break
            try:
                took_us = self.time_us(config)
                if took_us < 0.98 * best_us and self.is_right(config):
                    best, best_us = config, took_us
            except Exception as error:  # too much shared memory, for example
                print(f"  left out {config}: {str(error)[:80]}", flush=True)
        return best, best_us, default_us

    def default(self) -> Config:
        """What vLLM takes where nobody has tuned."""
        if self.shape.op == "shrink":
            few = self.rows < 128
            return shrink(32, 16, 256 if few else 32, 64 if few else 8, 4, 2)
        wide = 64 if len(self.shape.slices) > 1 else 128
        sizes = {"block_m": 64, "block_n": wide, "block_k": 32}
        return {**sizes, "num_warps": 4, "num_ctas": 1, "num_stages": 2, "max_nreg": None}

    def launch(self, config: Config, layer: int) -> None:
        """As `PunicaWrapperGPU` does it, with this configuration."""
        from vllm.lora.ops.triton_ops import lora_expand_op, lora_shrink_op

        meta = self.meta.meta_args(self.rows, False)
        if self.shape.op == "shrink":
            lora_shrink_op.get_lora_op_configs = lambda *_, **__: config  # type: ignore[attr-defined,assignment]
            lora_shrink_op._lora_shrink(self.input, self.weights[layer], self.output, *meta, 1.0)
        else:
            lora_expand_op.get_lora_op_configs = lambda *_, **__: config  # type: ignore[attr-defined,assignment]
            lora_expand_op._lora_expand(
                self.input, self.weights[layer], self.output, *meta, 0, True
            )

    def time_us(self, config: Config) -> float:
        """Of one launch, in a graph."""
        self.launch(config, 0)  # compiles, and puts the pointers on the GPU
        for layer in range(1, len(self.weights)):
            self.launch(config, layer)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for layer in range(len(self.weights)):
                self.launch(config, layer)
        graph.replay()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        best = float("inf")
        for _ in range(REPEATS):
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            best = min(best, begin.elapsed_time(end))
        return 1000 * best / len(self.weights)

    def is_right(self, config: Config) -> bool:
        """Whether it computes what torch does."""
        self.output.zero_()
        self.launch(config, 0)
        for at, weight in enumerate(self.weights[0]):
            if self.shape.op == "shrink":
                told, given = self.output[at], self.input.float()
            else:
                begin = sum(self.shape.slices[:at])
                told = self.output[:, begin : begin + self.shape.slices[at]].float()
                given = self.input[at].to(torch.bfloat16).float()
            for adapter in range(int(self.mapping.max()) + 1):
                rows = self.mapping == adapter
                right = given[rows] @ weight[adapter, 0].float().T
                if not torch.allclose(told[rows], right, atol=0.1, rtol=0.05):
                    return False
        return True


def compile_all(rank: int, max_loras: int, adapters: int) -> None:
    """Fill Triton's cache from many processes: compiling is most of the work."""
    spawn = multiprocessing.get_context("spawn")
    parts = max(1, (os.cpu_count() or 1) // len(SHAPES))
    running = [
        spawn.Process(target=_compile, args=(at, rank, max_loras, adapters, part, parts))
        for at, part in product(range(len(SHAPES)), range(parts))
    ]
    for process in running:
        process.start()
    for process in running:
        process.join(120)
        process.kill()


def _compile(at: int, rank: int, max_loras: int, adapters: int, part: int, parts: int) -> None:
    bench = Bench(SHAPES[at], 64, rank, max_loras, adapters)
    for number, config in enumerate(candidates(SHAPES[at].op, rank)):
        if number % parts == part:
            try:
                bench.launch(config, 0)
            except Exception:
                continue  # told by those who time it
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
