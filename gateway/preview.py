"""A row as the trainer sees it, held against what the server would render.

Training and serving agree only if each prompt of the row, which is what stands before an
assistant turn, has the same ids in both. Here both are asked. Where there is no prompt to ask for,
they are not said to agree: callers that read `matches_serving` alone took bad lines for good ones.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from engine.errors import InvalidRequest
from engine.generation import Chat, ChatMessage
from engine.shard import Shard
from lora_gateway.v1 import training_pb2 as pb
from store.job_records import DatasetRecord
from trainer.preparation import Preparations
from trainer.preview import TokenPreview
from trainer.spec import DataSpec

MAX_COMPARED = 8
"""Prompts of a row that the server renders: the last, which hold what is before the others. All of
them would be the square of the row."""


class Previews:
    """Shows rows of datasets."""

    def __init__(self, preparations: Preparations, find_shard: Callable[[], Shard]) -> None:
        """`find_shard` finds one that renders as it does for callers."""
        self._preparations = preparations
        self._find_shard = find_shard

    async def preview(
        self, dataset: DatasetRecord, path: Path, line: int, data: DataSpec
    ) -> pb.PreviewTokensResponse:
        """One line, from 1.

        Raises InvalidSpec for a line that is not there, or is no row, and ShardUnavailable.
        """
        preview = await self._preparations.preview(dataset, path, line, data)
        answers = len(preview.bounds)
        mismatch = "" if answers else _nothing_to_compare(preview)
        for index in range(max(0, answers - MAX_COMPARED), answers):
            mismatch = mismatch or await self._mismatch(index + 1, *preview.prompt(index))
        return pb.PreviewTokensResponse(
            text=preview.text,
            tokens=[
                pb.PreviewToken(id=token.id, text=token.text, trained=token.trained)
                for token in preview.tokens
            ],
            matches_serving=not mismatch,
            mismatch=mismatch,
            kept=preview.kept,
            reason=preview.reason,
        )

    async def _mismatch(
        self, number: int, messages: list[tuple[str, str]], prompt_ids: list[int]
    ) -> str:
        """Where the server's ids of a prompt differ from the trainer's; empty if nowhere."""
        chat = Chat([ChatMessage(role, content) for role, content in messages])
        try:
            served = list((await self._find_shard().render(chat)).token_ids)
        except InvalidRequest as error:
            return f"the server refuses the prompt of assistant turn {number}: {error}"
        if served == list(prompt_ids):
            return ""
        at = next(
            (i for i, (a, b) in enumerate(zip(served, prompt_ids, strict=False)) if a != b),
            min(len(served), len(prompt_ids)),
        )
        return (
            f"the prompt of assistant turn {number} has {len(prompt_ids)} tokens in training and "
            f"{len(served)} in serving, and they differ from token {at} on"
        )


def _nothing_to_compare(preview: TokenPreview) -> str:
    """Why no prompt of a line can be compared."""
    if not preview.tokens:
        return "nothing was compared, because the line is no row"
    return "nothing was compared, because no trained assistant turn of the row has a turn before it"
