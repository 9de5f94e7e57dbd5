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
    step_interval_s: float | None = None
    """In place of that, more than 0: all requests get a token at the same moments, this far apart,
    as an engine's steps make them, whether they are read or not. Who reads late gets several at
    once. One timer for all of them, so thousands cost no more than that."""
    dies_after_tokens: int | None = None
    """Each request ends with ShardUnavailable after this many tokens."""
    crash_part: CrashPart = CrashPart.NONE
    """What its requests have to do with that."""


class _Steps:
    """The moments at which all requests get a token, counted by the clock: an engine goes on while
    the event loop is busy."""

    def __init__(self, interval_s: float) -> None:
        self._interval_s = interval_s
        self._waiting: list[asyncio.Future[None]] = []

    @property
    def number(self) -> int:
        """Of the newest one."""
        return int(time.monotonic() / self._interval_s)

    async def after(self, number: int) -> int:
        """The newest one that comes after that; waits for it if there is none."""
        while self.number <= number:
            if not self._waiting:
                until_s = (self.number + 1) * self._interval_s - time.monotonic()
                asyncio.get_running_loop().call_later(until_s, self._step)
            turn = asyncio.get_running_loop().create_future()
            self._waiting.append(turn)
            await turn
        return self.number

    def _step(self) -> None:
        waiting, self._waiting = self._waiting, []
        for turn in waiting:
            if not turn.done():  # cancelled: its request was aborted
                turn.set_result(None)


class FakeShard:
    """Counts up: token k of an answer has id k and text "k ". One token per prompt word."""

    def __init__(self, name: str = "shard-0", script: Script | None = None) -> None:
        self._name = name
        self._script = script or Script()
        interval_s = self._script.step_interval_s
        self._steps = None if interval_s is None else _Steps(interval_s)
        self.running: set[str] = set()
        """Ids of the requests that are being generated."""
        self.aborted: list[str] = []
        """Ids of the requests that were left early, in order."""
        self.outputs = 0
        """That were read, of all requests."""

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
        begin = 0 if self._steps is None else self._steps.number
        finished = False
        try:
            gathered: list[int] = []
            made = 0
            while made < count:
                ready = min(count, await self._made(made, begin))
                if (last := self._script.dies_after_tokens) is not None and ready > last:
                    if made == last:
                        raise ShardUnavailable(self._name, self._script.crash_part)
                    ready = last
                gathered.extend(range(made, ready))
                made = ready
                finished = made == count
                if request.stream or finished:
                    self.outputs += 1
                    yield self._output(gathered, finished, len(prompt.token_ids), scheduled_s)
                    gathered = []
        finally:
            self.running.discard(request.request_id)
            if not finished:
                self.aborted.append(request.request_id)

    async def _made(self, before: int, begin: int) -> int:
        """Tokens of a request, once there are more than `before`; its first step came after
        `begin`."""
        if self._steps is not None:
            return await self._steps.after(begin + before) - begin
        await asyncio.sleep(self._script.token_interval_s)
        return before + 1

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
