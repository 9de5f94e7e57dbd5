"""What a prompt may be, and how it goes into a request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias, TypedDict, cast

from lora_gateway.v1.inference_pb2 import Chat, ChatMessage, TokenIds

ChatTurn: TypeAlias = ChatMessage | Mapping[str, str]
"""One turn: a `ChatMessage`, or a mapping with its fields `role` and `content`."""

Prompt: TypeAlias = str | Sequence[int] | Sequence[ChatTurn]
"""Text, token ids, or the turns of a chat, oldest first."""


class PromptField(TypedDict, total=False):
    """The one field of `GenerateRequest.prompt` that is to be set."""

    text: str
    token_ids: TokenIds
    chat: Chat


def prompt_field(prompt: Prompt) -> PromptField:
    """The field for `prompt`, as a keyword of `GenerateRequest`.

    An empty prompt goes out as it is: the server answers PROMPT_MISSING.

    Raises:
        TypeError: `prompt` is none of the three.
        ValueError: a turn has another field than `role` and `content`, or a token
            id is negative.
    """
    if isinstance(prompt, str):
        return {"text": prompt}
    if any(isinstance(item, (ChatMessage, Mapping)) for item in prompt):
        return {"chat": chat(cast(Sequence[ChatTurn], prompt))}
    if isinstance(prompt, (bytes, bytearray, memoryview)):
        raise TypeError("a prompt of bytes would be taken for token ids; decode it to str")
    return {"token_ids": TokenIds(ids=cast(Sequence[int], prompt))}


def chat(turns: Sequence[ChatTurn]) -> Chat:
    """The message for the turns of a chat.

    Raises:
        TypeError: an item is no turn.
        ValueError: a turn has another field than `role` and `content`.
    """
    return Chat(messages=[_message(turn) for turn in turns])


def _message(turn: ChatTurn) -> ChatMessage:
    return turn if isinstance(turn, ChatMessage) else ChatMessage(**turn)
