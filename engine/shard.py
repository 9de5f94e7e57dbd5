"""A shard: one engine core as one process drives it.

`Shard` is the seam that the pool and the edge see; `VllmShard` is vLLM's AsyncLLM behind it;
`engine/fake.py` is an honest fake for load and fault tests.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import uuid
from collections.abc import AsyncGenerator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from engine.adapter_loader import AdapterLoader, LoadTimes, StagedLoader, VllmLoader
from engine.core import STAGING
from engine.errors import (
    GenerationFailed,
    InvalidRequest,
    ShardUnavailable,
    Violation,
)
from engine.fingerprint import fingerprint, tag
from engine.generation import (
    Chat,
    ChatMessage,
    GenerationRequest,
    Load,
    Output,
    Prompt,
    ServedVersion,
)
from engine.liveness import Liveness, runs
from engine.model_info import ModelInfo
from engine.output import OutputReader
from engine.rendering import PromptRenderer, RenderedPrompt
from engine.sampling import build_params
from engine.screening import Screening
from engine.structured_output import StructuredOutputChecks
from engine.verdict import Verdict

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.output_processor import RequestOutputCollector

    from engine.core import ClientSlot

UTILITY_TIMEOUT_S = 60.0
"""Deadline of add_lora and other calls into a core."""


class Shard(Protocol):
    """One engine, as seen by whoever sends it requests."""

    @property
    def name(self) -> str:
        """Stable name, for example `shard-0`."""

    async def render(self, prompt: Prompt) -> RenderedPrompt:
        """Token ids of a prompt. Raises InvalidRequest or ChatTemplateMissing."""

    def generate(
        self, request: GenerationRequest, prompt: RenderedPrompt, version: ServedVersion | None
    ) -> AsyncGenerator[Output, None]:
        """Outputs of one request until it is finished; None is the base model.

        Open it with `contextlib.aclosing`: leaving early aborts the request in the engine.
        Raises InvalidRequest, GenerationFailed or ShardUnavailable.
        """

    async def tokenize(self, text: str) -> list[int]:
        """Token ids of text that goes on after a prompt. Raises InvalidRequest."""

    async def decode_each(self, token_ids: Sequence[int]) -> list[str]:
        """The text of each token by itself."""

    async def core_load(self) -> Load:
        """What the core has to do now, for all processes. Raises ShardUnavailable."""


class VllmShard:
    """A shard over vLLM's AsyncLLM, attached to a running core through a client slot."""

    def __init__(self, engine: AsyncLLM, slot: ClientSlot, screening: Screening) -> None:
        self._engine = engine
        self._name = slot.shard
        self._client_index = slot.index
        self._liveness = Liveness(slot.shard)
        self._screening = screening
        self._verdict = Verdict(slot.record_path)
        self._loader: AdapterLoader = VllmLoader(engine, self._liveness, UTILITY_TIMEOUT_S)
        if engine.vllm_config.parallel_config.worker_extension_cls == STAGING:
            self._loader = StagedLoader(engine, self.call_core, self._loader)
        self._removals: set[asyncio.Task[None]] = set()
        self._renderer = PromptRenderer(engine.renderer, engine.vllm_config)
        self._max_model_len = int(engine.model_config.max_model_len)
        self._checks = StructuredOutputChecks(engine)

    @classmethod
    def attach(cls, slot: ClientSlot, screening: Screening) -> VllmShard:
        """Drive the core of this slot, with what passes `screening`. Takes milliseconds once the
        core is ready.

        To be called on the event loop that will use it. Raises TimeoutError if the core
        does not greet the slot.
        """
        # vLLM would wait for the greeting, and hold up the event loop and all its streams.
        if not runs(slot.core_pid):
            raise TimeoutError(f"process {slot.core_pid} has ended, or is stopped")
        from vllm.v1.engine.async_llm import AsyncLLM
        from vllm.v1.executor import Executor

        from engine.stats import shard_stat_logger

        engine = AsyncLLM(
            slot.config,
            Executor.get_class(slot.config),
            log_stats=False,  # no default loggers; ours below turns statistics on
            log_requests=False,
            stat_loggers=[shard_stat_logger(slot.shard)],
            client_addresses=slot.client_addresses(),
            client_count=slot.count,
            client_index=slot.index,
        )
        return cls(engine, slot, screening)

    @property
    def name(self) -> str:
        return self._name

    @property
    def info(self) -> ModelInfo:
        """What is served."""
        from vllm import __version__ as VLLM_VERSION

        model = self._engine.model_config
        return ModelInfo(
            dtype=str(model.dtype).removeprefix("torch."),
            quantization=str(model.quantization or ""),
            architecture=str(model.architecture),
            vocab_size=int(model.get_vocab_size()),
            max_model_len=self._max_model_len,
            chat_template=self._renderer.chat_template,
            engine_version=VLLM_VERSION,
        )

    async def render(self, prompt: Prompt) -> RenderedPrompt:
        return await self._renderer.render(prompt)

    async def tokenize(self, text: str) -> list[int]:
        return await self._renderer.tokenize(text)

    async def decode_each(self, token_ids: Sequence[int]) -> list[str]:
        return await self._renderer.decode_each(token_ids)

    async def generate(
        self, request: GenerationRequest, prompt: RenderedPrompt, version: ServedVersion | None
    ) -> AsyncGenerator[Output, None]:
        from vllm.exceptions import VLLMClientError
        from vllm.v1.engine.exceptions import EngineDeadError

        finished = begun = False
        collector: RequestOutputCollector | None = None
        mark: int | None = None
        engine_id = request.request_id
        if request.accountable:
            lora_name = "" if version is None else version.lora_name
            mark = fingerprint(request.cache_salt, lora_name, prompt.token_ids, request.sampling)
            self._screening.check(mark, version)
            engine_id = tag(request.request_id, mark)
        try:
            params = build_params(
                request.sampling,
                stream=request.stream,
                tokens_per_delta=request.tokens_per_delta,
                prompt_tokens=len(prompt.token_ids),
                room_tokens=self._max_model_len - len(prompt.token_ids),
            )
            if request.cache_salt:
                prompt.engine_input["cache_salt"] = request.cache_salt
            lora = _lora_request(version)
            # 1. The request goes to the core; its outputs come through this collector.
            collector = await self._engine.add_request(
                engine_id,
                await self._checks.checked(engine_id, request, prompt, params, lora),
                params,
                lora_request=lora,
                trace_headers=request.trace_headers,
            )
            # 2. Take what is there without a task switch, else wait. What piles up while the
            #    caller is busy writing, vLLM merges into one output (output_processor.py:69).
            reader = OutputReader(request.sampling, self._name)
            while not finished:
                output = collector.get_nowait() or await collector.get()
                finished, begun = output.finished, True
                yield reader.read(output)  # type: ignore[arg-type]  # never a pooling output
        except VLLMClientError as error:
            finished = True  # refused before it reached the core
            raise _invalid_request(error) from error
        except EngineDeadError as error:
            finished = True  # nothing is left to abort
            part = await self._verdict.part_of(mark, waits=not begun)
            raise ShardUnavailable(self._name, part) from error
        else:
            if mark is not None:
                self._screening.finished(mark)
        finally:
            # 3. Left early: cancelled, out of time, or the caller is gone. By our own id if that
            #    came while the request was being added.
            if not finished:
                await asyncio.shield(self._abort(engine_id, collector))

    async def _abort(self, engine_id: str, collector: RequestOutputCollector | None) -> None:
        from vllm.v1.engine.exceptions import EngineDeadError

        with contextlib.suppress(EngineDeadError):
            if collector is None:
                await self._engine.abort(engine_id)
            else:  # by vLLM's own id, which also forgets the parent of several completions
                await self._engine.abort(collector.request_id, internal=True)

    async def warm_up(self) -> None:
        """Generate one token, so that the first caller does not pay for first times.

        A chat template is compiled at its first use, which took 0.5 s.
        """
        if self._renderer.chat_template:
            with contextlib.suppress(InvalidRequest):
                await self.render(Chat([ChatMessage("user", "warm up")]))
        request = GenerationRequest(
            request_id=f"warm-up-{uuid.uuid4().hex}",
            prompt="warm up",
            sampling={"max_tokens": 1, "temperature": 0.0},
            stream=True,
            accountable=False,
        )
        prompt = await self.render(request.prompt)
        async with contextlib.aclosing(self.generate(request, prompt, None)) as outputs:
            async for _ in outputs:
                pass

    async def load(self, version: ServedVersion) -> LoadTimes:
        """Load an adapter into the engine. Only then may `generate` name it.

        Tells how long the phases took. After a failure the engine forgets the id, because half of
        it may be in place (ADR 0004); a retry needs a new one. Raises GenerationFailed with vLLM's
        words, or ShardUnavailable after UTILITY_TIMEOUT_S.
        """
        lora = _lora_request(version)
        assert lora is not None
        try:
            return await self._loader.load(lora)
        except ShardUnavailable:
            if not self._liveness.dead:
                # It may succeed yet, and nobody would know of it. The core does this after it.
                removal = asyncio.create_task(self._loader.drop(version.lora_int_id))
                self._removals.add(removal)
                removal.add_done_callback(self._forget_removal)
            raise
        except Exception as error:  # the type is lost on the way from the core (core.py:1736)
            if self.broken:
                raise ShardUnavailable(self._name) from error
            with contextlib.suppress(Exception):
                drop = self._loader.drop(version.lora_int_id)
                await self._liveness.answer(drop, UTILITY_TIMEOUT_S)
            raise GenerationFailed(str(error)) from error

    def _forget_removal(self, removal: asyncio.Task[None]) -> None:
        self._removals.discard(removal)
        if not removal.cancelled():
            removal.exception()

    async def unload(self, version: ServedVersion) -> None:
        """Remove an adapter from the engine. Nothing may be running on it.

        Raises ShardUnavailable.
        """
        removal = self._engine.remove_lora(version.lora_int_id)
        await self._liveness.answer(removal, UTILITY_TIMEOUT_S)

    async def call_core(
        self, utility: str, *arguments: int | str, timeout_s: float | None = UTILITY_TIMEOUT_S
    ) -> Any:
        """Call a utility of `engine/core_plugin.py` in the core. Raises ShardUnavailable."""
        call = self._engine.engine_core.call_utility_async(utility, *arguments)
        return await self._liveness.answer(call, timeout_s)

    async def requests_of(self, lora_int_id: int) -> int:
        """Requests of this process on that adapter which the core still knows.

        The core reads what a process sends in order, so what was aborted before this call is
        no longer counted. Raises ShardUnavailable.
        """
        return int(await self.call_core("gateway_requests_of", self._client_index, lora_int_id))

    async def core_load(self) -> Load:
        return Load(*await self.call_core("gateway_load"))

    async def respond(self) -> None:
        """Return once the core answers, however long that takes. It does so between two steps.
        Raises ShardUnavailable if it is known to be dead."""
        await self.call_core("gateway_load", timeout_s=None)

    def declare_dead(self, crashed: bool | None = None) -> None:
        """End every request with ShardUnavailable, because the core is known to be dead.

        An attached client cannot see that by itself: only the core's parent can. `crashed` as for
        `judge`; None if the host has not said yet.
        """
        from vllm.v1.engine.exceptions import EngineDeadError

        if crashed is not None:
            self.judge(crashed)
        self._liveness.declare_dead()
        self._engine.engine_core.resources.engine_dead = True
        self._engine.output_processor.propagate_error(EngineDeadError())

    def judge(self, crashed: bool) -> None:
        """The host's verdict: whether what a dead core computed may be to blame."""
        self._verdict.say(crashed)

    @property
    def said_dead(self) -> bool:
        """Whether the core itself has said that an exception ends it; to be asked before it is
        declared dead."""
        return bool(self._engine.engine_core.resources.engine_dead)

    @property
    def broken(self) -> bool:
        """Whether this process can no longer hear its core, whatever the core does."""
        return bool(self._engine.errored)

    def close(self) -> None:
        """Let go of the core, which runs on. Blocks for a moment; safe to call twice."""
        for removal in self._removals:
            removal.cancel()
        self._checks.close()
        self._engine.shutdown(timeout=0)
        # vLLM leaves these threads and descriptors to the garbage collector, and that to chance: a
        # process that outlives many cores would run out of them.
        self._engine.engine_core.resources.ctx.destroy(linger=0)


def preload() -> None:
    """Import what `VllmShard.attach` needs, which takes seconds, ahead of its time.

    The garbage collector never looks at it again: with its 600,000 objects, which stay anyway, a
    full collection stopped all streams of a process for 0.3 s.
    """

    import engine.stats  # noqa: F401

    gc.collect()
    gc.freeze()


def _lora_request(version: ServedVersion | None) -> LoRARequest | None:
    if version is None:
        return None
    from vllm.lora.request import LoRARequest

    return LoRARequest(version.lora_name, version.lora_int_id, version.path)


def _invalid_request(error: Exception) -> InvalidRequest:
    """vLLM's refusal, under the field that it names."""
    field = getattr(error, "parameter", None)
    text = str(error.args[0]) if error.args else str(error)
    return InvalidRequest(Violation(f"sampling.{field}" if field else "sampling", text))
