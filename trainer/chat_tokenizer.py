"""The served model's tokenizer and chat template, used as the server uses them.

The server renders a chat with the template and tokenizes the text without adding special tokens:
what a text begins with is the template's business alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainer.formats import BadLine, Turn
from trainer.report import LineIssueCode

MAX_REASON_CHARACTERS = 200


class TokenizerUnusable(Exception):
    """The model has no chat template, or a tokenizer that does not tell where its tokens are."""


class ChatTokenizer:
    """Renders and tokenizes chats for one model. Blocks; may be used by many threads."""

    def __init__(self, model: Path) -> None:
        """Load it from the model's folder. Raises TokenizerUnusable, or OSError or ValueError if
        there is no tokenizer that transformers can read."""
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(
            model, local_files_only=True, trust_remote_code=False
        )
        if not tokenizer.chat_template:
            raise TokenizerUnusable(
                "the base model has no chat template: serve a model that was trained to chat"
            )
        if not tokenizer.is_fast:
            raise TokenizerUnusable(
                "the base model's tokenizer has no tokenizer.json: serve a model that has one"
            )
        self._tokenizer: Any = tokenizer
        self._backend: Any = tokenizer.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        self.bos_id: int | None = tokenizer.bos_token_id
        self.bos: str = tokenizer.bos_token or ""
        """The token that begins a text; empty if there is none."""
        self.anchors = frozenset(
            token_id
            for token_id, token in tokenizer.added_tokens_decoder.items()
            if not (token.normalized or token.lstrip or token.rstrip or token.single_word)
        )
        """Tokens that are cut out of a text before anything else is looked at: what stands before
        one does not change the tokens from it on."""
        self.max_token_characters: int = max(map(len, tokenizer.get_vocab()))

    def render(self, turns: Sequence[Turn], *, prompt: bool) -> str:
        """The text of a chat; `prompt`: up to where the assistant begins to answer.

        Raises BadLine with what the template says if it refuses the chat.
        """
        try:
            text = self._tokenizer.apply_chat_template(
                [turn._asdict() for turn in turns], tokenize=False, add_generation_prompt=prompt
            )
        except Exception as error:  # a template is a program of the model's author
            lines = str(error).strip().splitlines() or [type(error).__name__]
            reason = lines[0][:MAX_REASON_CHARACTERS]
            raise BadLine(
                LineIssueCode.TEMPLATE_REFUSED,
                "",
                f"the model's chat template refuses it: {reason}; change the line so that the "
                "template takes it",
            ) from error
        assert isinstance(text, str)
        return text

    def encode(self, text: str) -> Any:
        """A `tokenizers.Encoding` of the text: its ids, and where in the text they are."""
        return self._backend.encode(text, add_special_tokens=False)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens, special ones too."""
        text = self._tokenizer.decode(
            ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        assert isinstance(text, str)
        return text
