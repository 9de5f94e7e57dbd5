"""The fake shard does what its script says, and keeps the promises of a real one."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence

import pytest

from engine.errors import PromptMissing, ShardUnavailable
from engine.fake import FakeShard, Script
from engine.generation import Chat, ChatMessage, FinishReason, GenerationRequest, Output, Prompt
from engine.shard import Shard

SOON_S = 5.0


def request(
    prompt: Prompt = "one two three", *, max_tokens: int = 4, stream: bool = True
) -> GenerationRequest:
    return GenerationRequest("the-id", prompt, {"max_tokens": max_tokens}, stream=stream)


async def outputs_of(shard: Shard, asked: GenerationRequest) -> list[Output]:
    """All outputs of a request, through the seam that the pool sees."""
    prompt = await shard.render(asked.prompt)
    async with contextlib.aclosing(shard.generate(asked, prompt, None)) as outputs:
        return [output async for output in outputs]


def token_ids(outputs: Sequence[Output]) -> list[list[int]]:
    return [list(delta.token_ids) for output in outputs for delta in output.deltas]


async def test_a_stream_has_one_output_a_token_and_the_last_one_ends_it() -> None:
    outputs = await outputs_of(FakeShard(), request(max_tokens=3))
    assert token_ids(outputs) == [[0], [1], [2]]
    assert [output.finished for output in outputs] == [False, False, True]
    assert [output.deltas[0].text for output in outputs] == ["0 ", "1 ", "2 "]
    reasons = [output.deltas[0].finish_reason for output in outputs]
    assert reasons == [None, None, FinishReason.LENGTH]
    assert {output.prompt_tokens for output in outputs} == {3}


async def test_without_streaming_there_is_one_output_at_the_end() -> None:
    (output,) = await outputs_of(FakeShard(), request(max_tokens=3, stream=False))
    assert output.finished
    assert token_ids([output]) == [[0, 1, 2]]
    assert output.deltas[0].text == "0 1 2 "


@pytest.mark.parametrize(
    ("prompt", "tokens"),
    [
        ("one two three", 3),
        ([7, 8], 2),
        (Chat([ChatMessage("system", "be brief"), ChatMessage("user", "hi")]), 3),
    ],
    ids=["text", "token ids", "chat"],
)
async def test_a_prompt_has_a_token_a_word(prompt: Prompt, tokens: int) -> None:
    assert len((await FakeShard().render(prompt)).token_ids) == tokens


@pytest.mark.parametrize("prompt", ["", "  ", [], Chat([])], ids=repr)
async def test_a_prompt_that_holds_nothing_is_missing(prompt: Prompt) -> None:
    with pytest.raises(PromptMissing):
        await FakeShard().render(prompt)


async def test_the_text_of_each_token_is_what_it_generates() -> None:
    assert await FakeShard().decode_each([0, 41]) == ["0 ", "41 "]


async def test_a_request_that_ends_was_not_aborted() -> None:
    shard = FakeShard()
    await outputs_of(shard, request())
    assert not shard.running
    assert not shard.aborted


async def test_leaving_early_aborts_the_request() -> None:
    shard = FakeShard()
    asked = request(max_tokens=1000)
    prompt = await shard.render(asked.prompt)
    async with contextlib.aclosing(shard.generate(asked, prompt, None)) as outputs:
        await anext(outputs)
        assert shard.running == {"the-id"}
    assert not shard.running
    assert shard.aborted == ["the-id"]


async def test_cancelling_its_reader_aborts_the_request() -> None:
    shard = FakeShard(script=Script(token_interval_s=60))
    reading = asyncio.create_task(outputs_of(shard, request(stream=False)))
    async with asyncio.timeout(SOON_S):
        while not shard.running:
            await asyncio.sleep(0)
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    assert not shard.running
    assert shard.aborted == ["the-id"]


async def test_a_shard_that_dies_is_unavailable_after_that_many_tokens() -> None:
    shard = FakeShard("shard-7", Script(dies_after_tokens=2))
    asked = request(max_tokens=10)
    seen = []
    with pytest.raises(ShardUnavailable) as caught:
        async for output in shard.generate(asked, await shard.render(asked.prompt), None):
            seen.append(output)
    assert token_ids(seen) == [[0], [1]]
    assert caught.value.shard == shard.name == "shard-7"
    assert not shard.running


async def test_a_shard_that_would_die_later_finishes_a_short_answer() -> None:
    shard = FakeShard(script=Script(dies_after_tokens=2))
    outputs = await outputs_of(shard, request(max_tokens=2))
    assert outputs[-1].finished


async def test_tokens_come_at_the_interval_of_the_script() -> None:
    loop = asyncio.get_running_loop()
    start_s = loop.time()
    await outputs_of(FakeShard(script=Script(token_interval_s=0.02)), request(max_tokens=5))
    assert loop.time() - start_s >= 5 * 0.02 - 0.005


async def test_steps_come_at_their_interval_to_all_requests_at_once() -> None:
    loop = asyncio.get_running_loop()
    shard = FakeShard(script=Script(step_interval_s=0.02))
    for _ in range(2):
        start_s = loop.time()
        answers = await asyncio.gather(
            *(outputs_of(shard, request(max_tokens=5)) for _ in range(8))
        )
        assert loop.time() - start_s >= 4 * 0.02 - 0.005
        for outputs in answers:
            assert [token for ids in token_ids(outputs) for token in ids] == [0, 1, 2, 3, 4]
    assert shard.outputs >= 16


async def test_steps_go_on_while_nobody_reads() -> None:
    shard = FakeShard(script=Script(step_interval_s=0.01))
    prompt = await shard.render("one")
    generating = shard.generate(request(max_tokens=1000), prompt, None)
    async with contextlib.aclosing(generating) as outputs:
        first = await anext(outputs)
        await asyncio.sleep(0.05)
        second = await anext(outputs)
    (early,), (late,) = token_ids([first]), token_ids([second])
    assert early[0] == 0 and len(late) >= 4
    assert late == list(range(len(early), len(early) + len(late)))
    assert second.deltas[0].text == "".join(f"{token} " for token in late)


async def test_a_shard_of_steps_dies_after_that_many_tokens_too() -> None:
    shard = FakeShard("shard-7", Script(step_interval_s=0.001, dies_after_tokens=2))
    prompt = await shard.render("one")
    seen: list[Output] = []
    with pytest.raises(ShardUnavailable):
        async for output in shard.generate(request(max_tokens=10), prompt, None):
            seen.append(output)
            await asyncio.sleep(0.02)
    assert [token for ids in token_ids(seen) for token in ids] == [0, 1]


async def test_a_request_that_leaves_takes_nobody_elses_step() -> None:
    shard = FakeShard(script=Script(step_interval_s=0.01))
    leaving = asyncio.create_task(outputs_of(shard, request(max_tokens=1000)))
    staying = asyncio.create_task(outputs_of(shard, request(max_tokens=5)))
    async with asyncio.timeout(SOON_S):
        await asyncio.sleep(0)
        leaving.cancel()
        assert (await staying)[-1].finished
        with pytest.raises(asyncio.CancelledError):
            await leaving
    assert not shard.running
    assert shard.aborted == ["the-id"]


async def test_without_an_interval_others_still_get_their_turn() -> None:
    turns = 0

    async def other() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    beside = asyncio.create_task(other())
    await outputs_of(FakeShard(), request(max_tokens=50))
    beside.cancel()
    assert turns >= 50
