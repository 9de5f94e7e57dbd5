"""An honest fake shard: scripted tokens, delays and faults, no model.

For load and fault tests that need thousands of streams, or an engine that dies at a given
token. Nothing that claims to work is shown on it alone.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass

from engine.errors import CrashPart, PromptMissing, ShardUnavailable, Violation
from engine.generation import (
    Chat,
    Delta,
    FinishReason,
    GenerationRequest,
    Load,
    Output,
    Prompt,
    ServedVersion,
)
from engine.rendering import RenderedPrompt


@dataclass(frozen=True, slots=True)
class Script:
    """How a fake shard behaves."""

    token_interval_s: float = 0.0
    """Pause before each token; 0 still yields to the event loop."""
    dies_after_tokens: int | None = None
    """Each request ends with ShardUnavailable after this many tokens."""
    crash_part: CrashPart = CrashPart.NONE
    """What its requests have to do with that."""


class FakeShard:
    """Counts up: token k of an answer has id k and text "k ". One token per prompt word."""

    def __init__(self, name: str = "shard-0", script: Script | None = None) -> None:
        self._name = name
        self._script = script or Script()
        self.running: set[str] = set()
        """Ids of the requests that are being generated."""
        self.aborted: list[str] = []
        """Ids of the requests that were left early, in order."""

    @property
    def name(self) -> str:
        return self._name

    async def render(self, prompt: Prompt) -> RenderedPrompt:
        if isinstance(prompt, Chat):
            prompt = " ".join(message.content for message in prompt.messages)
        token_ids = list(range(len(prompt.split()))) if isinstance(prompt, str) else list(prompt)
        if not token_ids:
            raise PromptMissing(Violation("prompt", "must not be empty"))
        return RenderedPrompt(None, token_ids, 0.0)

    async def tokenize(self, text: str) -> list[int]:
        return list((await self.render(text)).token_ids)

    async def decode_each(self, token_ids: Sequence[int]) -> list[str]:
        return [f"{token_id} " for token_id in token_ids]

    async def core_load(self) -> Load:
        return Load(len(self.running), 0, 0, 0.0)

    async def generate(
        self, request: GenerationRequest, prompt: RenderedPrompt, version: ServedVersion | None
    ) -> AsyncGenerator[Output, None]:
        count = int(request.sampling.get("max_tokens", 16))
        self.running.add(request.request_id)
        scheduled_s = time.monotonic()
        finished = False
        try:
            gathered: list[int] = []
            for token_id in range(count):
                await asyncio.sleep(self._script.token_interval_s)
                if token_id == self._script.dies_after_tokens:
                    raise ShardUnavailable(self._name, self._script.crash_part)
                gathered.append(token_id)
                finished = token_id == count - 1
                if request.stream or finished:
                    yield self._output(gathered, finished, len(prompt.token_ids), scheduled_s)
                    gathered = []
        finally:
            self.running.discard(request.request_id)
            if not finished:
                self.aborted.append(request.request_id)

    def _output(
        self, token_ids: list[int], finished: bool, prompt_tokens: int, scheduled_s: float
    ) -> Output:
        text = "".join(f"{token_id} " for token_id in token_ids)
        reason = FinishReason.LENGTH if finished else None
        return Output(
            deltas=[Delta(0, text, token_ids, finish_reason=reason)],
            finished=finished,
            prompt_tokens=prompt_tokens,
            cached_tokens=0,
            scheduled_s=scheduled_s,
        )
