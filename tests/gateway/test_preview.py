"""What the server renders of a row to compare is bounded, and goes to its end."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from engine.generation import Chat
from engine.rendering import RenderedPrompt
from engine.shard import Shard
from gateway.preview import MAX_COMPARED, Previews
from store.job_records import DatasetRecord
from trainer.preparation import Preparations
from trainer.preview import PreviewedToken, TokenPreview
from trainer.spec import DataSpec

ANSWERS = 100
RECORD = DatasetRecord("acme", "faq", "d" * 64, 1, "", 0)


class OneRow:
    """A chat of many turns, each of one token."""

    def __init__(self, answers: int = ANSWERS, *, first: tuple[str, ...] = ()) -> None:
        self._roles = first + ("user", "assistant") * answers
        self._answers = answers

    async def preview(self, *_: Any) -> TokenPreview:
        roles = self._roles
        return TokenPreview(
            text="",
            tokens=[PreviewedToken(at, "", False) for at in range(len(roles))],
            messages=[(role, "x") for role in roles],
            bounds=[(2 * number + 1, 2 * number + 1) for number in range(self._answers)],
            kept=bool(roles),
            reason="" if roles else "not JSON",
        )


class RenderingShard:
    """Renders a message as its index, but for the last before the answer that is named."""

    def __init__(self, wrong_answer: int = 0) -> None:
        self.asked: list[int] = []
        self._wrong = wrong_answer

    async def render(self, chat: Chat) -> RenderedPrompt:
        count = len(chat.messages)
        self.asked.append(count)
        ids = list(range(count))
        if count == 2 * self._wrong - 1:
            ids[-1] = 999
        return RenderedPrompt("", ids, 0.0)


async def shown(shard: RenderingShard, row: OneRow | None = None) -> Any:
    previews = Previews(cast(Preparations, row or OneRow()), lambda: cast(Shard, shard))
    return await previews.preview(RECORD, Path("d"), 1, DataSpec())


async def test_the_last_prompts_are_compared_and_no_more() -> None:
    shard = RenderingShard()
    assert (await shown(shard)).matches_serving
    assert shard.asked == [2 * answer - 1 for answer in range(ANSWERS - MAX_COMPARED + 1, 101)]


async def test_a_prompt_that_differs_is_told_by_its_number() -> None:
    answer = await shown(RenderingShard(wrong_answer=97))
    assert not answer.matches_serving
    assert answer.mismatch.startswith("the prompt of assistant turn 97 has 193 tokens")
    assert answer.mismatch.endswith("differ from token 192 on")


async def test_a_line_of_which_no_prompt_was_compared_is_not_said_to_match() -> None:
    shard = RenderingShard()
    bad = await shown(shard, OneRow(0))
    assert not bad.matches_serving and "the line is no row" in bad.mismatch
    alone = await shown(shard, OneRow(0, first=("assistant",)))
    assert alone.tokens and not alone.matches_serving
    assert "no trained assistant turn" in alone.mismatch
    assert not shard.asked
