"""A process that drives one engine core through bare AsyncLLMs, and measures what they get.

    python -m tests.gpu.bare_engine SPEC        asked by JSON lines on stdin (`measured_engine.py`)

SPEC is JSON: `model`, `dtype`, `engine` (more of vLLM's `AsyncEngineArgs`), `adapters` (folders),
`front_ends`. Each front end is a process with an AsyncLLM on a client slot of its own, as in the
gateway's workers; one asks for statistics of none.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import multiprocessing
import os
import sys
import tempfile
import time
import uuid
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM

    from engine.core import ClientSlot, EngineCore


def main() -> None:
    """Entry of the process."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what vLLM prints is for the log

    def answer(value: Any) -> None:
        print(json.dumps(value), file=answers, flush=True)

    spec = json.loads(sys.argv[1])
    core = start_core(spec)
    # Not multiprocessing's default, fork: ADR 0002.
    spawn = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    try:
        for index in range(spec["front_ends"]):
            ours, theirs = spawn.Pipe()
            slot = core.take_slot()
            given = (slot, spec["adapters"], index == 0, theirs)
            process = spawn.Process(target=front_end, args=given, daemon=True)
            process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)
        for pipe in pipes:
            assert pipe.recv() == "ready"
        answer("ready")
        while line := sys.stdin.readline():
            question = json.loads(line)
            answer(ask(pipes, question))
    finally:
        for pipe in pipes:
            pipe.close()
        for process in processes:
            process.join(5)
            process.kill()
        asyncio.run(core.stop())


def start_core(spec: dict[str, Any]) -> EngineCore:
    """The core, with the gateway's own options but for what the spec says."""
    from engine.core import EngineCore, EngineOptions
    from tests.gpu.lean_gateway import build_config

    options = EngineOptions(
        model_path=Path(spec["model"]),
        served_model_name="measured",
        dtype=spec["dtype"],
        quantization=None,
        max_model_len=2048,
        max_num_seqs=512,
        gpu_memory_utilization=0.9,
        max_loras=8,
        max_cpu_loras=64,
        max_lora_rank=32,
    )
    record = Path(tempfile.mkdtemp(prefix="bare-engine-")) / "steps"
    return asyncio.run(EngineCore.start("bare", build_config(options, spec["engine"]), record))


def ask(pipes: list[Connection], question: dict[str, Any]) -> Any:
    """Put a question to as many front ends as it names, and put their answers together."""
    asked = pipes[: question.get("front_ends", 1)]
    share, rest = divmod(question.get("in_flight", 0), len(asked))
    for index, pipe in enumerate(asked):
        first = index * share + min(index, rest)
        pipe.send({**question, "lanes": range(first, first + share + (index < rest))})
    told = [pipe.recv() for pipe in asked]
    if failed := [each for each in told if isinstance(each, str)]:
        return {"failed": failed[0]}
    if question["what"] != "round":
        return {}
    begun, ended, tokens = zip(*told, strict=True)
    return {"seconds": max(ended) - min(begun), "tokens": sum(tokens)}


def front_end(slot: ClientSlot, adapters: list[str], loads: bool, pipe: Connection) -> None:
    """Entry of a front end: answers until its pipe is closed. One of them `loads` adapters."""
    import uvloop

    uvloop.run(_front_end(slot, adapters, loads, pipe))


async def _front_end(slot: ClientSlot, adapters: list[str], loads: bool, pipe: Connection) -> None:
    from vllm.lora.request import LoRARequest
    from vllm.utils.gc_utils import freeze_gc_heap
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.executor import Executor

    engine = AsyncLLM(
        slot.config,
        Executor.get_class(slot.config),
        log_stats=False,
        log_requests=False,
        client_addresses=slot.client_addresses(),
        client_count=slot.count,
        client_index=slot.index,
    )
    slot.close()
    loras = [LoRARequest(f"a{n}", n, path) for n, path in enumerate(adapters, 1)]
    if loads:
        if "VLLM_PLUGINS" not in os.environ:  # else it is vLLM as it comes
            await engine.engine_core.call_utility_async("gateway_adopt", os.getppid())
        for lora in loras:
            await engine.add_lora(lora)
    freeze_gc_heap()  # as `vllm serve` does
    pipe.send("ready")
    with contextlib.suppress(EOFError):
        while True:
            question = await asyncio.to_thread(pipe.recv)
            try:
                pipe.send(await _answer(engine, loras, question))
            except Exception as error:
                pipe.send(f"{type(error).__name__}: {error}")
    os._exit(0)  # the core goes with its parent, and has nothing to be told


async def _answer(engine: AsyncLLM, loras: list[Any], question: dict[str, Any]) -> Any:
    if question["what"] == "profile":
        steps = question["steps"]
        await engine.engine_core.profile_async(bool(steps), None, question["skip"], steps or None)
        return {}
    from vllm.sampling_params import RequestOutputKind, SamplingParams

    kind = RequestOutputKind.DELTA if question["stream"] else RequestOutputKind.FINAL_ONLY

    def params() -> SamplingParams:
        return SamplingParams(
            max_tokens=question["tokens"],
            temperature=0.0,
            ignore_eos=True,
            output_kind=kind,
            stream_interval=question["tokens_per_delta"] if question["stream"] else None,
        )

    counted = 0

    async def lane(number: int) -> None:
        nonlocal counted
        used = question["adapters"]
        lora = loras[number % used] if used else None
        for _ in range(question["waves"]):
            # A dict of its own: vLLM writes into it.
            prompt = {"prompt_token_ids": list(question["prompt"])}
            tokens = 0
            outputs = engine.generate(prompt, params(), uuid.uuid4().hex, lora_request=lora)  # type: ignore[arg-type]
            async for output in outputs:
                tokens += len(output.outputs[0].token_ids)
            assert tokens == question["tokens"], f"{tokens} tokens"
            counted += tokens

    begun_s = time.monotonic()
    await asyncio.gather(*map(lane, question["lanes"]))
    return begun_s, time.monotonic(), counted


if __name__ == "__main__":
    main()
