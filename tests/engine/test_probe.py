"""A version that answers in NaN, or like the base model, is told from one that works."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace

import pytest

from engine import probe as module
from engine.errors import GenerationFailed, ShardUnavailable
from engine.fake import FakeShard, Script
from engine.generation import (
    GenerationRequest,
    Output,
    PositionLogprobs,
    ServedVersion,
    TokenLogprob,
)
from engine.probe import PROBE_TOKENS, Probe
from engine.rendering import RenderedPrompt

BASE_LOGPROB = -1.0
VERSION = ServedVersion("acme", "sql", 1, 7, "/sql", "digest")


def position(logprob: float, second: float = -3.0) -> PositionLogprobs:
    return PositionLogprobs(
        TokenLogprob(1, logprob, 1, "a"),
        [TokenLogprob(1, logprob, 1, "a"), TokenLogprob(2, second, 2, "b")],
    )


class ScoringShard(FakeShard):
    """Scores each token as it is told, by version; the first token of a prompt has no score."""

    def __init__(self, script: Script | None = None) -> None:
        super().__init__(script=script)
        self.prompt_scores = {0: position(BASE_LOGPROB), 1: position(BASE_LOGPROB)}
        self.answer_scores = {0: position(BASE_LOGPROB), 1: position(BASE_LOGPROB)}
        self.asked: list[tuple[GenerationRequest, int]] = []
        self.fails: Exception | None = None

    async def generate(
        self, request: GenerationRequest, prompt: RenderedPrompt, version: ServedVersion | None
    ) -> AsyncGenerator[Output, None]:
        number = version.version if version else 0
        self.asked.append((request, number))
        if self.fails is not None:
            raise self.fails
        scored = [self.prompt_scores[number]] * (len(prompt.token_ids) - 1)
        async with aclosing(super().generate(request, prompt, version)) as outputs:
            async for output in outputs:
                (delta,) = output.deltas
                logprobs = [self.answer_scores[number]] * len(delta.token_ids)
                yield replace(
                    output,
                    deltas=[replace(delta, logprobs=logprobs)],
                    prompt_logprobs=[PositionLogprobs(None, []), *scored],
                )


async def findings(shard: ScoringShard) -> list[str]:
    return await Probe().findings(VERSION, shard)


async def test_a_version_that_changes_answers_passes() -> None:
    shard = ScoringShard()
    shard.answer_scores[1] = position(-1.5)
    assert await findings(shard) == []


async def test_a_change_of_the_prompts_scores_is_enough() -> None:
    shard = ScoringShard()
    shard.prompt_scores[1] = position(-1.5)
    assert await findings(shard) == []


async def test_so_is_a_change_of_a_token_that_was_not_chosen() -> None:
    shard = ScoringShard()
    shard.answer_scores[1] = position(BASE_LOGPROB, math.nextafter(-3.0, 0.0))
    assert await findings(shard) == []


async def test_a_version_that_answers_like_the_base_model_is_refused() -> None:
    (finding,) = await findings(ScoringShard())
    assert finding.startswith("it changes nothing") and "after it was trained" in finding


@pytest.mark.parametrize("spoiled", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", ["prompt_scores", "answer_scores"])
@pytest.mark.parametrize("chosen", [True, False])
async def test_a_version_that_answers_in_no_numbers_is_refused(
    spoiled: float, place: str, chosen: bool
) -> None:
    shard = ScoringShard()
    getattr(shard, place)[1] = position(spoiled) if chosen else position(-1.5, spoiled)
    (finding,) = await findings(shard)
    assert "NaN or infinity" in finding and "train again" in finding


async def test_without_scores_nothing_is_taken_for_a_change() -> None:
    assert await Probe().findings(VERSION, FakeShard()) != []


async def test_the_base_model_is_asked_once_and_each_request_is_short_greedy_and_its_own() -> None:
    shard = ScoringShard()
    probe = Probe()
    for _ in range(2):
        await probe.findings(VERSION, shard)
    assert [number for _, number in shard.asked] == [0, 1, 1]
    requests = [request for request, _ in shard.asked]
    assert len({request.request_id for request in requests}) == 3
    for request in requests:
        assert request.sampling["temperature"] == 0.0
        assert request.sampling["max_tokens"] == PROBE_TOKENS
        assert not request.stream
    assert shard.running == set() and shard.aborted == []


async def test_no_answer_in_time_is_the_shards_fault_and_leaves_no_request(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "PROBE_TIMEOUT_S", 0.02)
    shard = ScoringShard(Script(token_interval_s=60.0))
    with pytest.raises(ShardUnavailable, match="shard-0"):
        await findings(shard)
    assert shard.running == set() and len(shard.aborted) == 1


async def test_a_cancelled_probe_leaves_no_request() -> None:
    shard = ScoringShard(Script(token_interval_s=60.0))
    probing = asyncio.create_task(findings(shard))
    while not shard.running:
        await asyncio.sleep(0)
    probing.cancel()
    await asyncio.gather(probing, return_exceptions=True)
    assert shard.running == set() and len(shard.aborted) == 1


@pytest.mark.parametrize("error", [ShardUnavailable("shard-0"), GenerationFailed("no")])
async def test_what_the_shard_raises_comes_through_and_is_not_kept(error: Exception) -> None:
    shard = ScoringShard()
    shard.answer_scores[1] = position(-1.5)
    probe = Probe()
    shard.fails = error
    with pytest.raises(type(error)):
        await probe.findings(VERSION, shard)
    shard.fails = None
    assert await probe.findings(VERSION, shard) == []
