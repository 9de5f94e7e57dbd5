"""One line of a dataset as the trainer sees it."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from trainer.chat_tokenizer import ChatTokenizer, TokenizerUnusable
from trainer.dataset_rows import DatasetRows, format_of
from trainer.errors import InvalidSpec, TrainingUnavailable
from trainer.formats import BadLine
from trainer.lines import line_at
from trainer.masks import MaskedRow
from trainer.overlength import Fit
from trainer.publisher import Finding
from trainer.rows import IGNORED
from trainer.spec import DataSpec, OverlengthPolicy

MAX_TOKENS = 65_536
"""Of a row that is shown although it is too long to be trained on; at most the server's context."""
MAX_MESSAGES = 1024
"""Of a line that is shown. A template is asked for all before each answer, here in the host."""


class PreviewedToken(NamedTuple):
    """One token of a row."""

    id: int
    text: str
    """Of the token by itself."""
    trained: bool


@dataclass(frozen=True, slots=True)
class TokenPreview:
    """One line."""

    text: str
    """As the chat template renders it; empty with `tokens` if the line is no row."""
    tokens: list[PreviewedToken]
    messages: Sequence[tuple[str, str]]
    """Role and content of each."""
    bounds: Sequence[tuple[int, int]]
    """Of the prompt of each answer that is trained: so many messages, and so many tokens."""
    kept: bool
    """Whether it is trained on as it is."""
    reason: str
    """Why it is left out or shortened; empty: neither."""

    def prompt(self, number: int) -> tuple[list[tuple[str, str]], list[int]]:
        """The messages before an answer, from 0, and the row's ids there: what the server has to
        render of these messages. A copy: those of all answers are the square of the row."""
        messages, tokens = self.bounds[number]
        return list(self.messages[:messages]), [token.id for token in self.tokens[:tokens]]


class Previewer:
    """Shows lines of datasets for one model. Blocks; may be used by many threads."""

    def __init__(self, model: Path, *, max_tokens: int = MAX_TOKENS) -> None:
        """`max_tokens` is the server's context."""
        self._model = model
        self._max_tokens = min(max_tokens, MAX_TOKENS)
        self._loading = threading.Lock()
        self._chat: ChatTokenizer | None = None

    def preview(self, path: Path, line: int, data: DataSpec) -> TokenPreview:
        """One line, from 1; `data` has every field set but its format.

        Raises InvalidSpec if there is no such line or it has too many messages to be shown,
        TrainingUnavailable if the model cannot be trained or the file is gone, and OSError.
        """
        try:
            text = line_at(path, line)
            rows = DatasetRows(self._tokenizer(), data, format_of(path, data))
        except FileNotFoundError as error:
            raise TrainingUnavailable(
                "the dataset's file is not there any more: delete the dataset, and upload it again"
            ) from error
        except LookupError as error:
            raise InvalidSpec(
                Finding("line", "the dataset has not so many lines: take one that it has")
            ) from error
        except TokenizerUnusable as error:
            raise TrainingUnavailable(str(error)) from error
        try:
            if (messages := len(rows.parse(text))) > MAX_MESSAGES:
                raise InvalidSpec(
                    Finding("line", f"has {messages} messages, and {MAX_MESSAGES} can be shown")
                )
            fit = rows.fit(text)
            if fit.row is not None:
                return self._shown(fit.row, _why_changed(fit))
            draft = rows.masks.draft(rows.parse(text), max_tokens=self._max_tokens)
            limit = _limit(data, rows.overlength.max_tokens)
            if draft is None:
                return _nothing(f"it has more than {self._max_tokens} tokens, and may have {limit}")
            row = rows.masks.mask(draft)
        except BadLine as error:
            return _nothing(f"{error.field}: {error.message}" if error.field else error.message)
        return self._shown(row, f"it has {len(row.ids)} tokens, and may have {limit}")

    def _tokenizer(self) -> ChatTokenizer:
        with self._loading:
            if self._chat is None:
                self._chat = ChatTokenizer(self._model)
            return self._chat

    def _shown(self, row: MaskedRow, reason: str) -> TokenPreview:
        chat = self._tokenizer()
        return TokenPreview(
            text=row.text,
            tokens=[
                PreviewedToken(token_id, chat.decode([token_id]), label != IGNORED)
                for token_id, label in zip(row.ids, row.labels, strict=True)
            ],
            messages=[(turn.role, turn.content) for turn in row.turns],
            bounds=[(prompt.turns, prompt.tokens) for prompt in row.prompts],
            kept=not reason,
            reason=reason,
        )


def _why_changed(fit: Fit) -> str:
    if fit.row is not None and not fit.row.trained:
        return "it has no token that is trained: the model's chat template leaves the answer out"
    if fit.turns_left_out:
        return f"it is too long, so {fit.turns_left_out} of its oldest messages are left out"
    return ""


def _limit(data: DataSpec, max_tokens: int) -> str:
    if data.overlength is OverlengthPolicy.DROP:
        return f"{max_tokens} (max_row_tokens): raise that, or split the line"
    return (
        f"{max_tokens} (max_sequence_tokens less reserve_tokens), which its last exchange alone "
        "exceeds: raise that, or shorten the exchange"
    )


def _nothing(reason: str) -> TokenPreview:
    return TokenPreview(text="", tokens=[], messages=[], bounds=[], kept=False, reason=reason)
