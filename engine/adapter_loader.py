"""How a shard gets an adapter into its engine: read by a thread of ours, or by vLLM itself."""

from __future__ import annotations

import enum
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from engine.errors import ShardUnavailable

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest
    from vllm.v1.engine.async_llm import AsyncLLM

    from engine.liveness import Liveness

CallCore = Callable[..., Awaitable[Any]]
"""A utility of the core, by its name and with its arguments. Raises ShardUnavailable, and what the
core answers as an exception."""


class LoadPhase(enum.Enum):
    """What the load of an adapter passes through, in this order."""

    QUEUE = "queue"
    """It is wanted, and others are loaded before it."""
    PREPARE = "prepare"
    """Its files are verified, and a place is made for it."""
    READ = "read"
    """A thread reads it, while the engine goes on; nothing of that if vLLM reads it."""
    COMMIT = "commit"
    """The engine takes it over between two steps, or between each of several."""
    ALL = "all"
    """From READ on, failed attempts too."""


LoadTimes = Mapping[LoadPhase, float]
"""How long phases took, in seconds."""


class AdapterLoader(Protocol):
    """Loads adapters into one core, for the host."""

    async def load(self, lora: LoRARequest) -> LoadTimes:
        """Load one. Raises ShardUnavailable, and what the core answers as an exception; half of it
        may be in place then."""

    async def drop(self, lora_int_id: int) -> None:
        """Have what is left of a load that failed, or took too long, removed once the core gets
        to it."""


class VllmLoader:
    """vLLM's own: the whole load happens between two steps."""

    def __init__(self, engine: AsyncLLM, liveness: Liveness, timeout_s: float) -> None:
        self._engine = engine
        self._liveness = liveness
        self._timeout_s = timeout_s

    async def load(self, lora: LoRARequest) -> LoadTimes:
        begin_s = time.monotonic()
        await self._liveness.answer(self._engine.add_lora(lora), self._timeout_s)
        return {LoadPhase.COMMIT: time.monotonic() - begin_s}

    async def drop(self, lora_int_id: int) -> None:
        await self._engine.remove_lora(lora_int_id)


class StagedLoader:
    """Ours: read in a thread of vLLM's workers, and taken over by parts (ADR 17).

    What could not be loaded is loaded by vLLM the next time, so that no mistake of ours keeps an
    adapter out of an engine that would take it.
    """

    def __init__(self, engine: AsyncLLM, call_core: CallCore, fallback: AdapterLoader) -> None:
        self._engine = engine
        self._call_core = call_core
        self._fallback = fallback
        self._failed: set[str] = set()
        """Names of adapters whose last load failed here."""

    async def load(self, lora: LoRARequest) -> LoadTimes:
        if lora.lora_name in self._failed:
            self._failed.discard(lora.lora_name)
            return await self._fallback.load(lora)
        try:
            return await self._load(lora)
        except ShardUnavailable:
            raise
        except Exception:
            self._failed.add(lora.lora_name)
            raise

    async def _load(self, lora: LoRARequest) -> LoadTimes:
        begin_s = time.monotonic()
        await self._call_core("gateway_stage", lora.lora_name, lora.lora_int_id, lora.lora_path)
        read_s = time.monotonic()
        # Each call is answered between two steps, so a step runs before the next one.
        while not await self._call_core("gateway_commit", lora.lora_int_id):
            pass
        return {LoadPhase.READ: read_s - begin_s, LoadPhase.COMMIT: time.monotonic() - read_s}

    async def drop(self, lora_int_id: int) -> None:
        await self._engine.engine_core.call_utility_async("gateway_unstage", lora_int_id)
        await self._engine.remove_lora(lora_int_id)
