"""Checks of structured output in threads: schemas, expressions and grammars that callers send."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any

from engine.errors import InvalidStructuredOutput, Violation
from engine.generation import GenerationRequest
from engine.rendering import RenderedPrompt

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest
    from vllm.sampling_params import SamplingParams
    from vllm.v1.engine import EngineCoreRequest
    from vllm.v1.engine.async_llm import AsyncLLM


class StructuredOutputChecks:
    """Has vLLM compile grammars off the event loop. Owned by a shard, which calls `close`.

    `add_request` compiles the grammar to check it, and would do so on the event loop: a hostile
    regular expression stops every stream for its 5 s limit (async_llm.py:472).
    """

    def __init__(self, engine: AsyncLLM) -> None:
        self._engine = engine
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="structured-output")

    async def checked(
        self,
        engine_id: str,
        request: GenerationRequest,
        prompt: RenderedPrompt,
        params: SamplingParams,
        lora: LoRARequest | None,
    ) -> Any:
        """What to hand to `add_request`: the rendered prompt, or for structured output a request
        that vLLM has checked in a thread.

        Raises InvalidStructuredOutput, and what vLLM says of other parameters.
        """
        if params.structured_outputs is None:
            return prompt.engine_input
        from vllm.exceptions import VLLMValidationError

        process = partial(
            self._engine.input_processor.process_inputs,
            engine_id,
            prompt.engine_input,
            params,
            supported_tasks=await self._engine.get_supported_tasks(),
            lora_request=lora,
            trace_headers=request.trace_headers,
        )
        # Threads of our own, so that nobody's tokenizing waits; but bad words are tokenized, and
        # the tokenizer is for vLLM's renderer thread alone.
        threads = self._engine.renderer._executor if params.bad_words else self._threads
        try:
            checked: EngineCoreRequest = await asyncio.get_running_loop().run_in_executor(
                threads, process
            )
        except (VLLMValidationError, ValueError) as error:
            if getattr(error, "parameter", None) not in (None, "structured_outputs"):
                raise
            raise InvalidStructuredOutput(
                Violation("sampling.structured_outputs", f"cannot be used: {str(error)[:500]}")
            ) from error
        return checked

    def close(self) -> None:
        """Begin no more checks. Safe to call twice."""
        self._threads.shutdown(wait=False, cancel_futures=True)
