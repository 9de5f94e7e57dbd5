"""The bare side: vLLM's AsyncLLM with the gateway's engine arguments, and nothing around it.

    python -m tests.bench.bare STATE_DIR ADAPTER_DIR SETTING...

Makes the model and the adapter first, for the other sides too. The settings are flags of
`gateway serve`. Requests go through `generate`, or through what it is made of.
"""

from __future__ import annotations

import contextlib
import os
import sys
import uuid
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gateway.run_dir import run_dir
from gateway.settings import Settings, prepare_environment
from tests.bench.front_end import Kind, check_tokens
from tests.bench.side import Side, serve_side, take_stdout
from tests.bench.workload import ADAPTER, Open, Round, Stream, Workload

if TYPE_CHECKING:
    from engine.core import EngineOptions

ADAPTER_RANK = 8


class BareSide:
    """One way into the bare engine; the process is another's."""

    def __init__(self, side: Side, kind: Kind) -> None:
        self._side = side
        self.kind = kind

    def serves(self, adapter: str) -> bool:
        """All."""
        return True

    def round(self, workload: Workload) -> Round:
        """Run the workload for throughput. Raises CallsFailed."""
        measured = self._side.round(workload, self.kind)
        check_tokens(workload, measured.tokens)
        return measured

    def first_tokens(self, workload: Workload) -> list[float]:
        """Run the workload one request at a time; seconds to each first token."""
        return self._side.first_tokens(workload, self.kind)

    def text(self, workload: Workload) -> str:
        """The answer to one request of the workload."""
        return self._side.text(workload, self.kind)


def main() -> None:
    """Entry of the process."""
    answer = take_stdout()
    state_dir, adapter_dir, *flags = sys.argv[1:]
    settings = Settings.from_argv([*flags, "--state-dir", state_dir])
    with run_dir() as folder:
        prepare_environment(settings, folder)
        _serve(settings, adapter_dir, answer)


def _serve(settings: Settings, adapter_dir: str, answer: Callable[[Any], None]) -> None:
    import uvloop

    from engine.models import resolve_model
    from tests.tiny_adapter import write_tiny_adapter

    model_path = resolve_model(settings.model, settings.state_dir)
    write_tiny_adapter(Path(adapter_dir), model_path, seed=1, rank=ADAPTER_RANK)
    options = engine_options(settings, model_path)
    uvloop.run(_run(options, adapter_dir, answer))


def engine_options(settings: Settings, model_path: Path) -> EngineOptions:
    """The engine's options as the host derives them: those that settings have by the same name."""
    from engine.core import EngineOptions

    shared = {field.name for field in fields(EngineOptions)} & Settings.model_fields.keys()
    options = {name: getattr(settings, name) for name in shared}
    options |= {"max_lora_rank": int(settings.max_lora_rank)}
    return EngineOptions(model_path=model_path, served_model_name=settings.model, **options)


async def _run(options: EngineOptions, adapter_dir: str, answer: Callable[[Any], None]) -> None:
    from vllm.lora.request import LoRARequest
    from vllm.sampling_params import RequestOutputKind, SamplingParams
    from vllm.utils.gc_utils import freeze_gc_heap
    from vllm.v1.engine.async_llm import AsyncLLM

    from engine.rendering import PromptRenderer
    from engine.stats import shard_stat_logger

    DELTA, FINAL_ONLY = RequestOutputKind.DELTA, RequestOutputKind.FINAL_ONLY
    config = options.build_config()
    engine = AsyncLLM.from_vllm_config(
        config,
        disable_log_stats=True,  # no default loggers; the same one as a worker's
        stat_loggers=[shard_stat_logger("bare")],
    )
    # As the gateway's core: it ends when this process is gone.
    await engine.engine_core.call_utility_async("gateway_adopt", os.getpid())
    renderer = PromptRenderer(engine.renderer, config)
    lora = LoRARequest(ADAPTER, 1, adapter_dir)
    await engine.add_lora(lora)
    freeze_gc_heap()  # as `vllm serve` does

    async def generate(workload: Workload) -> Stream:
        outputs = engine.generate(*await request_of(workload), **lora_of(workload))
        async with contextlib.aclosing(outputs):
            async for output in outputs:
                yield _piece(output)

    async def add_request(workload: Workload) -> Stream:
        prompt, params, request_id = await request_of(workload)
        collector = await engine.add_request(request_id, prompt, params, **lora_of(workload))
        finished = False
        while not finished:
            output = collector.get_nowait() or await collector.get()
            finished = output.finished
            yield _piece(output)

    async def request_of(workload: Workload) -> tuple[Any, SamplingParams, str]:
        params = SamplingParams(
            max_tokens=workload.tokens,
            temperature=0.0,
            ignore_eos=True,
            output_kind=DELTA if workload.streaming else FINAL_ONLY,
        )
        rendered = await renderer.render(workload.prompt)
        return rendered.engine_input, params, uuid.uuid4().hex

    def lora_of(workload: Workload) -> dict[str, Any]:
        return {"lora_request": lora if workload.adapter else None}

    ways: dict[str, Open] = {Kind.GENERATE: generate, Kind.ADD_REQUEST: add_request}
    try:
        # What the host's settings leave to vLLM, which chooses by who asks it.
        told = {"max_num_batched_tokens": config.scheduler_config.max_num_batched_tokens}
        await serve_side(ways, answer, told)
    finally:
        engine.shutdown()


def _piece(output: Any) -> tuple[int, str]:
    (completion,) = output.outputs
    return len(completion.token_ids), completion.text


if __name__ == "__main__":  # vLLM's processes import this file again
    main()
