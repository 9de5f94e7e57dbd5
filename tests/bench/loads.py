"""What loads of adapters cost those who decode, and who waits for them: staged against vLLM's own.

    python -m tests.bench.loads [--wide] [--rank N] [--model DIR --adapters DIR]

One bare engine, and the loaders of `engine/adapter_loader.py` in turns on it: while streams decode
and adapters come at a rate, gaps between tokens; with nothing else to do, first tokens.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import itertools
import json
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.adapter_loader import AdapterLoader, StagedLoader, VllmLoader
from engine.core import EngineOptions
from engine.liveness import Liveness
from engine.models import resolve_model
from gateway.run_dir import run_dir
from gateway.settings import Settings, prepare_environment
from tests.bench.load_rows import NONE, STAGED, VLLM, Row, Rows
from tests.bench.machine import Machine
from tests.tiny_adapter import write_tiny_adapter

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest
    from vllm.v1.engine.async_llm import AsyncLLM

SLOTS, PLACES = 8, 64
PROMPT = (5, 6, 7, 8)
STREAM_TOKENS, ANSWER_TOKENS = 1500, 32
SETTLE_S = 0.5
LOAD_TIMEOUT_S = 60.0


class Engine:
    """A bare engine with both loaders."""

    def __init__(self, engine: AsyncLLM, folders: Sequence[Path]) -> None:
        self._engine = engine
        self._folders = itertools.cycle(folders)
        self._ids: Iterator[int] = itertools.count(1)
        liveness = Liveness("bare")
        vllms = VllmLoader(engine, liveness, LOAD_TIMEOUT_S)
        staged = StagedLoader(engine, engine.engine_core.call_utility_async, vllms)
        self._loaders: dict[str, AdapterLoader] = {VLLM: vllms, STAGED: staged}

    def adapter(self) -> LoRARequest:
        """One that the engine has never seen."""
        from vllm.lora.request import LoRARequest

        number = next(self._ids)
        return LoRARequest(f"bench/adapter@{number}", number, str(next(self._folders)))

    async def load(self, kind: str, lora: LoRARequest) -> None:
        """By one of the loaders."""
        await self._loaders[kind].load(lora)

    async def unload(self, lora: LoRARequest) -> None:
        """Afterwards it is on disk only."""
        await self._engine.remove_lora(lora.lora_int_id)

    async def stream(self, lora: LoRARequest | None, tokens: int) -> list[float]:
        """When the outputs of one request came."""
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        params = SamplingParams(
            max_tokens=tokens,
            temperature=0.0,
            ignore_eos=True,
            output_kind=RequestOutputKind.DELTA,
        )
        times_s = []
        async for _ in self._engine.generate(
            {"prompt_token_ids": [*PROMPT]}, params, uuid.uuid4().hex, lora_request=lora
        ):
            times_s.append(time.perf_counter())
        return times_s

    async def answer(self, kind: str, folder: Path) -> list[int]:
        """Tokens by the adapter in that folder, loaded by `kind`."""
        from vllm.lora.request import LoRARequest
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        number = next(self._ids)
        lora = LoRARequest(f"bench/answer@{number}", number, str(folder))
        await self.load(kind, lora)
        params = SamplingParams(
            max_tokens=ANSWER_TOKENS,
            temperature=0.0,
            ignore_eos=True,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        tokens: list[int] = []
        async for output in self._engine.generate(
            {"prompt_token_ids": [*PROMPT]}, params, uuid.uuid4().hex, lora_request=lora
        ):
            tokens.extend(output.outputs[0].token_ids)
        await self.unload(lora)
        return tokens

    async def first_token_s(self, lora: LoRARequest, kind: str = NONE) -> float:
        """From the wish to the first token; loaded by `kind` before, if it is one."""
        begin_s = time.perf_counter()
        if kind != NONE:
            await self.load(kind, lora)
        return (await self.stream(lora, 1))[0] - begin_s


class Decoding:
    """Streams that go on, half of them on one adapter."""

    def __init__(self, engine: Engine, streams: int, lora: LoRARequest) -> None:
        self.gaps_s: list[float] = []
        self._engine = engine
        self._tasks = [
            asyncio.create_task(self._decode(lora if number % 2 else None))
            for number in range(streams)
        ]

    async def _decode(self, lora: LoRARequest | None) -> None:
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        params = SamplingParams(
            max_tokens=STREAM_TOKENS,
            temperature=0.0,
            ignore_eos=True,
            output_kind=RequestOutputKind.DELTA,
        )
        while True:
            last_s = None
            async for _ in self._engine._engine.generate(
                {"prompt_token_ids": [*PROMPT]}, params, uuid.uuid4().hex, lora_request=lora
            ):
                now_s = time.perf_counter()
                if last_s is not None:
                    self.gaps_s.append(now_s - last_s)
                last_s = now_s

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


async def measure(engine: Engine, folders: Sequence[Path], options: argparse.Namespace) -> Rows:
    """All rows, in turns."""
    rows = Rows()
    for folder in folders:
        ours, vllms = [await engine.answer(kind, folder) for kind in (STAGED, VLLM)]
        rows.answers_equal.append(ours == vllms)
    resident = engine.adapter()
    await engine.load(STAGED, resident)
    await _first_tokens(engine, rows, resident, options.first_tokens)
    decoding = Decoding(engine, options.streams, resident)
    await asyncio.sleep(options.warm_up_s)
    for number in range(options.rounds):
        kinds = (NONE, VLLM, STAGED) if number % 2 == 0 else (STAGED, VLLM, NONE)
        for kind in kinds:
            await asyncio.sleep(SETTLE_S)
            decoding.gaps_s = []
            await _load_often(engine, kind, rows.rows[kind], options)
            rows.rows[kind].add_gaps(decoding.gaps_s)
    await decoding.close()
    return rows


async def _load_often(engine: Engine, kind: str, row: Row, options: argparse.Namespace) -> None:
    end_s = time.perf_counter() + options.seconds
    for at_s in itertools.count(time.perf_counter(), 1 / options.rate):
        if at_s >= end_s:
            break
        await asyncio.sleep(max(0.0, at_s - time.perf_counter()))
        if kind != NONE:
            lora, begin_s = engine.adapter(), time.perf_counter()
            await engine.load(kind, lora)
            row.loads_s.append(time.perf_counter() - begin_s)
            await engine.unload(lora)
        if time.perf_counter() >= end_s:
            break


async def _first_tokens(engine: Engine, rows: Rows, warm: LoRARequest, count: int) -> None:
    cached = [engine.adapter() for _ in range(SLOTS + 1)]
    for lora in cached:
        await engine.load(STAGED, lora)
    for number in range(count):
        rows.warm_s.append(await engine.first_token_s(warm))
        rows.cached_s.append(await engine.first_token_s(cached[number % len(cached)]))
        for kind in (VLLM, STAGED) if number % 2 == 0 else (STAGED, VLLM):
            lora = engine.adapter()
            rows.rows[kind].first_tokens_s.append(await engine.first_token_s(lora, kind))
            await engine.unload(lora)
        await engine.first_token_s(warm)
    for lora in cached:
        await engine.unload(lora)


def write_wide(folder: Path, tiny: Path) -> Path:
    """A model of which an adapter is large against what a step costs."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=512,
        intermediate_size=2048,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    for path in tiny.iterdir():
        if "token" in path.name or "template" in path.name:
            shutil.copy(path, folder)
    return folder


def main() -> None:
    """Entry of the command."""
    options = _options()
    machine = Machine.here()
    settings = Settings.from_argv(["--model", "tiny"])
    with tempfile.TemporaryDirectory(prefix="bench-loads-") as name, run_dir() as sockets:
        prepare_environment(settings, sockets)
        folder = Path(name)
        model = options.model or resolve_model("tiny", folder)
        if options.wide:
            model = write_wide(folder / "wide", model)
        folders = (
            sorted(options.adapters.iterdir())
            if options.adapters
            else [
                write_tiny_adapter(folder / f"{seed}", model, seed=seed, rank=options.rank)
                for seed in range(1, 5)
            ]
        )
        size_bytes = (folders[0] / "adapter_model.safetensors").stat().st_size
        print(machine)
        print(
            f"{'wide' if options.wide else model.name}, adapters of rank {options.rank}, "
            f"{size_bytes / 1e6:.1f} MB; {options.streams} streams; {options.rate:g} loads a "
            f"second; {options.rounds} times {options.seconds:g} s of each, in turns",
            flush=True,
        )
        rows = asyncio.run(_run(model, folders, options))
        gc.collect()  # vLLM's engine is closed; at the interpreter's end that fails
    print(rows.table())
    if options.json is not None:
        options.json.write_text(json.dumps(rows.raw()) + "\n")


async def _run(model: Path, folders: Sequence[Path], options: argparse.Namespace) -> Rows:
    from vllm.v1.engine.async_llm import AsyncLLM

    from engine.stats import shard_stat_logger

    config = EngineOptions(
        model_path=model,
        served_model_name="bench",
        dtype="auto",
        quantization=None,
        max_model_len=2048,
        max_num_seqs=256,
        gpu_memory_utilization=0.8,
        max_loras=SLOTS,
        max_cpu_loras=PLACES,
        max_lora_rank=max(8, options.rank),
        adapter_loader="staged",
    ).build_config()
    engine = AsyncLLM.from_vllm_config(
        config, disable_log_stats=True, stat_loggers=[shard_stat_logger("bare")]
    )
    try:
        return await measure(Engine(engine, folders), folders, options)
    finally:
        engine.shutdown()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.loads", description=__doc__)
    parser.add_argument("--wide", action="store_true", help="a larger model, and adapters of it")
    parser.add_argument("--model", type=Path, help="a model folder, for example on a GPU")
    parser.add_argument("--adapters", type=Path, help="a folder of adapters of that model")
    parser.add_argument("--rank", type=int, default=8, help="of the adapters, and the highest")
    parser.add_argument("--streams", type=int, default=4, help="that decode meanwhile")
    parser.add_argument("--rate", type=float, default=5.0, help="of loads, a second")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=4, help="of all three")
    parser.add_argument("--first-tokens", type=int, default=50, help="of each way to load")
    parser.add_argument("--warm-up-s", type=float, default=5.0)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


if __name__ == "__main__":  # vLLM's processes import this file again
    main()
