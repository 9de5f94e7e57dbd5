"""Examples of a held-out set, and the JSON Lines file that holds them."""

from __future__ import annotations

import json
from codecs import BOM_UTF8
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from engine.errors import InvalidRequest, Violation
from engine.generation import Chat, ChatMessage
from engine.scoring import Scorer

MAX_EXAMPLES = 10_000
MAX_DATASET_BYTES = 16 * 1024**2
MAX_CONTAINS = 64
"""Texts that one answer is searched for, which happens on the event loop."""
MAX_CHAT_MESSAGES = 4096
ROLES = ("system", "user", "assistant", "tool")

MAX_QUOTED_CHARS = 40
"""Of a name from the file, in a sentence about it."""


@dataclass(frozen=True, slots=True)
class Example:
    """One question, with what is expected of the answer."""

    prompt: str | Chat
    expected: str | None = None
    contains: tuple[str, ...] = ()
    """Texts that must all be in the answer; where empty, `expected` is looked for."""

    @property
    def wanted(self) -> tuple[str, ...]:
        """What CONTAINS looks for. White space around `expected` is not, so that an exact match
        contains it."""
        if self.contains:
            return self.contains
        expected = (self.expected or "").strip()
        return (expected,) if expected else ()

    def serves(self, scorer: Scorer) -> bool:
        """Whether it has what the scorer needs."""
        match scorer:
            case Scorer.EXACT_MATCH:
                return self.expected is not None
            case Scorer.CONTAINS:
                return bool(self.wanted)
            case Scorer.VALID_JSON:
                return True
            case Scorer.LOG_LIKELIHOOD:
                return bool(self.expected)

    def violations(self) -> Iterator[tuple[str, str]]:
        """Field and sentence of what is wrong with it."""
        if isinstance(self.prompt, str):
            if not self.prompt:
                yield "text", "must not be empty"
        elif not self.prompt.messages:
            yield "chat.messages", "must not be empty; add a user message"
        elif len(self.prompt.messages) > MAX_CHAT_MESSAGES:
            yield "chat.messages", f"may have {MAX_CHAT_MESSAGES} entries"
        else:
            for index, message in enumerate(self.prompt.messages):
                if message.role not in ROLES:
                    yield (
                        f"chat.messages[{index}].role",
                        f"{message.role[:12]!r} is unknown; use one of {', '.join(ROLES)}",
                    )
        if len(self.contains) > MAX_CONTAINS:
            yield "contains", f"may have {MAX_CONTAINS} entries"
        elif "" in self.contains:
            index = self.contains.index("")
            yield f"contains[{index}]", "must not be empty: every answer contains it"


def parse_jsonl(data: bytes) -> list[Example]:
    """The examples of a JSON Lines file, one a line, with the fields of EvaluationExample.

    As in the JSON form of protobuf, null is a field that is not set. Raises InvalidRequest with
    every bad line under `dataset_uri:LINE`, counted from 1. MAX_DATASET_BYTES take some tenths
    of a second: call it in a thread.
    """
    if len(data) > MAX_DATASET_BYTES:
        raise InvalidRequest(
            Violation("dataset_uri", f"may have {MAX_DATASET_BYTES} bytes, has more; split it")
        )
    lines = data.removeprefix(BOM_UTF8).split(b"\n", MAX_EXAMPLES)
    if not lines[-1].strip():
        lines.pop()
    if not 1 <= len(lines) <= MAX_EXAMPLES:
        amount = "more" if lines else "none"
        raise InvalidRequest(
            Violation("dataset_uri", f"must have 1 to {MAX_EXAMPLES} lines, has {amount}")
        )
    examples, wrong = list[Example](), list[Violation]()
    for number, line in enumerate(lines, start=1):
        try:
            examples.append(_example(line))
        except ValueError as error:
            wrong.append(Violation(f"dataset_uri:{number}", str(error)))
    if wrong:
        raise InvalidRequest(*wrong)
    return examples


def _example(line: bytes) -> Example:
    """The example of one line. Raises ValueError with a sentence."""
    fields = _object(_parsed(line), "", ("text", "chat", "expected", "contains"))
    text, chat = fields.get("text"), fields.get("chat")
    if (text is None) == (chat is None):
        raise ValueError("set one of text and chat")
    expected = fields.get("expected")
    contains = _list(fields.get("contains"), "contains")
    example = Example(
        prompt=_text(text, "text") if chat is None else _chat(chat),
        expected=None if expected is None else _text(expected, "expected"),
        contains=tuple(_text(value, f"contains[{i}]") for i, value in enumerate(contains)),
    )
    for field, sentence in example.violations():
        raise ValueError(f"{field}: {sentence}")
    return example


def _parsed(line: bytes) -> Any:
    if not line.strip():
        raise ValueError("is empty; put one JSON object on each line")
    try:
        # Python refuses to convert whole numbers of over 4300 digits; no field is a number.
        return json.loads(line.decode(), object_pairs_hook=_unique, parse_int=float)
    except UnicodeDecodeError as error:
        raise ValueError(f"is not UTF-8 at byte {error.start + 1}") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"is not JSON: {error.msg} at character {error.pos + 1}") from error
    except RecursionError as error:
        raise ValueError("is nested too deep") from error


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """An object, unless the last of two equal names would hide the first."""
    fields = dict[str, Any]()
    for name, value in pairs:
        if name in fields:
            raise ValueError(f"names {_quoted(name)} twice")
        fields[name] = value
    return fields


def _object(value: Any, field: str, known: Sequence[str]) -> dict[str, Any]:
    lead = f"{field}: " if field else ""
    if not isinstance(value, dict):
        raise ValueError(f"{lead}must be a JSON object")
    for name in value:
        if name not in known:
            raise ValueError(f"{lead}{_quoted(name)} is unknown; known are {', '.join(known)}")
    return value


def _chat(value: Any) -> Chat:
    messages = _list(_object(value, "chat", ("messages",)).get("messages"), "chat.messages")
    turns = list[ChatMessage]()
    for index, message in enumerate(messages):
        path = f"chat.messages[{index}]"
        fields = _object(message, path, ("role", "content"))
        role, content = fields.get("role"), fields.get("content")
        turns.append(
            ChatMessage(
                _text(role, f"{path}.role"),
                "" if content is None else _text(content, f"{path}.content"),
            )
        )
    return Chat(turns)


def _list(value: Any, field: str) -> list[Any]:
    if value is None:
        return []
    if not isinstance(value, list):
        raise ValueError(f"{field}: must be a JSON array")
    return value


def _text(value: Any, field: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{field}: must be a JSON string")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can write half a character: no tokenizer takes it
        raise ValueError(f"{field}: holds a lone surrogate, which is no character") from error
    return value


def _quoted(name: str) -> str:
    return repr(name[:MAX_QUOTED_CHARS])
