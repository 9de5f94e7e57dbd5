"""The probe: a short greedy generation that every version passes before it may serve.

An adapter can be well-formed, load, and still do nothing or answer in NaNs. So the engine
scores a fixed text with it, token by token, and goes on from there; all scores must be
numbers, and some must differ from the base model's.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import uuid

from engine.errors import ShardUnavailable
from engine.generation import GenerationRequest, PositionLogprobs, ServedVersion
from engine.shard import Shard

PROBE_TEXT = "Once upon a time there was a small town by the sea, and in it lived"
PROMPT_TOKENS, PROBE_TOKENS = 10, 4
"""Together within the smallest context that can be set (16)."""
PROBE_TIMEOUT_S = 60.0

Scores = tuple[tuple[int, float], ...]
"""Token and log probability at each position, best candidates among them."""


class Probe:
    """Compares versions with the base model, each on the shard where it is loaded."""

    def __init__(self) -> None:
        self._base: dict[str, Scores] = {}
        """By shard: equal to the last bit means equal on one and the same."""

    async def findings(self, version: ServedVersion, shard: Shard) -> list[str]:
        """What is wrong with the answers of a version that `shard` has loaded; empty if nothing is.

        Raises ShardUnavailable, also when there is no answer within PROBE_TIMEOUT_S.
        """
        try:
            async with asyncio.timeout(PROBE_TIMEOUT_S):
                if shard.name not in self._base:
                    self._base[shard.name] = await _scores(shard, None)
                scores = await _scores(shard, version)
        except TimeoutError as error:
            raise ShardUnavailable(shard.name) from error
        if not all(math.isfinite(logprob) for _, logprob in scores):
            return [
                "the model answers in NaN or infinity with it: train again with a lower "
                "lora_alpha or learning rate"
            ]
        if scores == self._base[shard.name]:
            return [
                "it changes nothing: the answers are the base model's, to the last bit; save the "
                "adapter after it was trained"
            ]
        return []


async def _scores(shard: Shard, version: ServedVersion | None) -> Scores:
    request = GenerationRequest(
        request_id=f"probe-{uuid.uuid4().hex}",
        prompt=PROBE_TEXT,
        sampling={
            "max_tokens": PROBE_TOKENS,
            "temperature": 0.0,
            "logprobs": 3,
            "prompt_logprobs": 3,
            "ignore_eos": True,
        },
        stream=False,
    )
    whole = await shard.render(PROBE_TEXT)
    prompt = await shard.render(list(whole.token_ids[:PROMPT_TOKENS]))
    positions: list[PositionLogprobs] = []
    async with contextlib.aclosing(shard.generate(request, prompt, version)) as outputs:
        async for output in outputs:
            positions += output.prompt_logprobs
            for delta in output.deltas:
                positions += delta.logprobs or ()
    return tuple(
        (token.token_id, token.logprob)
        for position in positions
        for token in (position.chosen, *position.top)
        if token is not None
    )
