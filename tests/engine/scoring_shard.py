"""A shard that scores prompts: no model, but each token and place has its own log probability."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace

from engine.errors import InvalidRequest, Violation
from engine.fake import FakeShard, Script
from engine.generation import (
    GenerationRequest,
    Output,
    PositionLogprobs,
    Prompt,
    ServedVersion,
    TokenLogprob,
)
from engine.rendering import RenderedPrompt


def logprob(token_id: int, position: int, version: ServedVersion | None) -> float:
    """What the shard says of a token; the base model likes each half as much."""
    return -(token_id + position / 8) / (10 if version else 5)


class ScoringShard(FakeShard):
    """Scores prompts by `logprob`, unless a test says otherwise."""

    def __init__(self, script: Script | None = None) -> None:
        super().__init__(script=script)
        self.asked: list[tuple[GenerationRequest, ServedVersion | None]] = []
        self.most_running = 0
        self.spoils: dict[int, float] = {}
        """Log probabilities of tokens, by the version."""
        self.fails: Exception | None = None
        self.drops = 0
        """Positions that come back without a score, from the begin."""
        self.swaps = False
        """Whether scores come back of other positions than asked for."""

    async def render(self, prompt: Prompt) -> RenderedPrompt:
        if 99 in (prompt if isinstance(prompt, list) else []):
            raise InvalidRequest(Violation("prompt", "has ids that the model has not"))
        return await super().render(prompt)

    async def generate(
        self, request: GenerationRequest, prompt: RenderedPrompt, version: ServedVersion | None
    ) -> AsyncGenerator[Output, None]:
        self.asked.append((request, version))
        if self.fails is not None:
            raise self.fails
        spoils = self.spoils if version else {}
        scores = [
            PositionLogprobs(
                TokenLogprob(token, spoils.get(token, logprob(token, place, version)), 1, ""), []
            )
            for place, token in enumerate(prompt.token_ids)
        ]
        scores[0] = PositionLogprobs(None, [])
        if self.swaps:
            scores[1:] = reversed(scores[1:])
        async with aclosing(super().generate(request, prompt, version)) as outputs:
            async for output in outputs:
                self.most_running = max(self.most_running, len(self.running))
                yield replace(output, prompt_logprobs=scores[self.drops :])
