"""From a prompt to token ids, as the engine will see them. Never on the event loop.

Tokenizing and chat templates run in vLLM's renderer threads; what this adds is checks with
typed errors before any work that a caller could make expensive.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from engine.errors import (
    ChatTemplateMissing,
    ChatTemplateRefused,
    InvalidRequest,
    PromptMissing,
    PromptTooLong,
    Violation,
)
from engine.generation import Chat, Prompt

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.renderers import BaseRenderer


@dataclass(frozen=True, slots=True)
class RenderedPrompt:
    """A prompt that is ready for the engine."""

    engine_input: Any
    """vLLM's `EngineInput`; opaque outside this package."""
    token_ids: Sequence[int]
    render_s: float
    """Time that rendering took."""


class PromptRenderer:
    """Renders text, token ids and chats for one base model."""

    def __init__(self, renderer: BaseRenderer[Any], config: VllmConfig) -> None:
        self._renderer = renderer
        model = config.model_config
        self._base_model = str(model.served_model_name)
        self._max_model_len = int(model.max_model_len)
        self._vocab_size = int(model.get_vocab_size())
        tokenizer = renderer.get_tokenizer()
        self.chat_template: str = getattr(tokenizer, "chat_template", None) or ""
        """The model's chat template; empty if it has none."""
        # No prompt that fits the context can have more characters than this.
        self._max_chars = self._max_model_len * int(tokenizer.max_chars_per_token)

    async def render(self, prompt: Prompt) -> RenderedPrompt:
        """Token ids of a prompt that leaves room for at least one token of answer.

        Raises PromptMissing, PromptTooLong, InvalidRequest (a token id outside the
        vocabulary), ChatTemplateMissing or ChatTemplateRefused.
        """
        from vllm.exceptions import VLLMValidationError

        start = time.monotonic()
        try:
            if isinstance(prompt, str):
                engine_input = await self._render_text(prompt)
            elif isinstance(prompt, Chat):
                engine_input = await self._render_chat(prompt)
            else:
                engine_input = self._render_token_ids(prompt)
        except VLLMValidationError as error:  # raised for one thing alone: too many tokens
            raise self._too_long(self._max_model_len + 1) from error
        token_ids = engine_input["prompt_token_ids"]
        if not token_ids:
            raise PromptMissing(Violation("prompt", "renders to no tokens; say more"))
        if len(token_ids) >= self._max_model_len:
            raise self._too_long(len(token_ids))
        return RenderedPrompt(engine_input, token_ids, time.monotonic() - start)

    async def tokenize(self, text: str) -> list[int]:
        """Token ids of text that goes on after a prompt: no special tokens around it.

        Raises PromptMissing or PromptTooLong.
        """
        from vllm.exceptions import VLLMValidationError

        try:
            engine_input = await self._render_text(text, special_tokens=False)
        except VLLMValidationError as error:
            raise self._too_long(self._max_model_len + 1) from error
        token_ids: list[int] = list(engine_input["prompt_token_ids"])
        if not token_ids:
            raise PromptMissing(Violation("text", "renders to no tokens; say more"))
        return token_ids

    async def decode_each(self, token_ids: Sequence[int]) -> list[str]:
        """The text of each token by itself."""
        tokenizer = self._renderer.get_tokenizer()
        return await asyncio.to_thread(lambda: [tokenizer.decode([i]) for i in token_ids])

    async def _render_text(self, text: str, *, special_tokens: bool = True) -> Any:
        if not text:
            raise PromptMissing(Violation("text", "must not be empty"))
        self._check_chars(len(text))
        from vllm.inputs import TextPrompt

        parameters = self._renderer.default_cmpl_tok_params
        if not special_tokens:
            parameters = parameters.with_kwargs(add_special_tokens=False)
        (engine_input,) = await self._renderer.render_cmpl_async(
            [TextPrompt(prompt=text)], parameters
        )
        return engine_input

    def _render_token_ids(self, token_ids: Sequence[int]) -> Any:
        if not token_ids:
            raise PromptMissing(Violation("token_ids", "must not be empty"))
        if len(token_ids) >= self._max_model_len:
            raise self._too_long(len(token_ids))
        if max(token_ids) >= self._vocab_size:
            raise InvalidRequest(
                Violation(
                    "token_ids",
                    f"ids must be below {self._vocab_size}; {max(token_ids)} is not",
                )
            )
        from vllm.inputs import tokens_input

        return tokens_input(list(token_ids))

    async def _render_chat(self, chat: Chat) -> Any:
        if not chat.messages:
            raise PromptMissing(Violation("chat.messages", "must not be empty"))
        if not self.chat_template:
            raise ChatTemplateMissing(self._base_model)
        self._check_chars(sum(len(message.content) for message in chat.messages))
        from vllm.renderers import ChatParams

        conversation: list[Any] = [{"role": m.role, "content": m.content} for m in chat.messages]
        parameters = ChatParams(
            chat_template_content_format="string",
            chat_template_kwargs={"add_generation_prompt": True},
        )
        try:
            _, (engine_input,) = await self._renderer.render_chat_async([conversation], parameters)
        except (TemplateError, ValueError) as error:
            raise ChatTemplateRefused(
                Violation("chat.messages", f"the model's chat template refuses them: {error}")
            ) from error
        return engine_input

    def _check_chars(self, characters: int) -> None:
        if characters > self._max_chars:
            raise PromptTooLong(
                Violation(
                    "prompt",
                    f"has {characters} characters; no prompt of more than {self._max_chars} fits "
                    f"the context of {self._max_model_len} tokens; shorten it",
                ),
                metadata={"max_model_len": str(self._max_model_len)},
            )

    def _too_long(self, prompt_tokens: int) -> PromptTooLong:
        # vLLM stops tokenizing one token past the context, so the count is a lower bound then.
        count = "at least " if prompt_tokens == self._max_model_len + 1 else ""
        return PromptTooLong(
            Violation(
                "prompt",
                f"has {count}{prompt_tokens} tokens; the context of {self._max_model_len} must "
                "also hold the answer; shorten it",
            ),
            metadata={
                "max_model_len": str(self._max_model_len),
                "prompt_tokens": str(prompt_tokens),
            },
        )
