"""From a line of a dataset to the turns of a chat.

What is not read is ignored: datasets carry ids, scores and sources. What is read has to be as the
format says, and a line that is not is told with its field and with what to do.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from trainer.report import LineIssueCode
from trainer.spec import DatasetFormat

SYSTEM, USER, ASSISTANT = "system", "user", "assistant"
ROLES = (SYSTEM, USER, ASSISTANT, "tool")

REQUIRED: Mapping[DatasetFormat, tuple[str, ...]] = {
    DatasetFormat.CHAT: ("messages",),
    DatasetFormat.PROMPT_COMPLETION: ("prompt", "completion"),
    DatasetFormat.ALPACA: ("instruction", "output"),
}
"""Fields that a line must have. A line that has those of several is read as the first."""

DETECTION_LINES = 1000
"""That are looked at for one that tells the format."""
MAX_QUOTED_CHARACTERS = 40
"""Of a text from the file, in a sentence about it."""


class Turn(NamedTuple):
    """One message of a chat."""

    role: str
    """One of ROLES."""
    content: str


class BadLine(Exception):
    """Why a line is no row. The message says what is wrong and what to do."""

    def __init__(self, code: LineIssueCode, field: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.field = field
        self.message = message


def parse(line: bytes | None, format: DatasetFormat | None) -> list[Turn]:
    """The turns of one line; the last is the assistant's.

    None is a line that was too long to be read, or a format that no line told. Raises BadLine.
    """
    return _turns(_fields(line), format)


def detect(lines: Iterable[bytes | None]) -> DatasetFormat | None:
    """The format of the first good lines; if none is good, of the first that has its fields."""
    named: DatasetFormat | None = None
    for line in itertools.islice(lines, DETECTION_LINES):
        try:
            fields = _fields(line)
            found = _named(fields)
            if found is None:
                continue
            named = named or found
            _turns(fields, found)
        except BadLine:
            continue
        return found
    return named


def _named(fields: Mapping[str, Any]) -> DatasetFormat | None:
    for format, names in REQUIRED.items():
        if all(name in fields for name in names):
            return format
    return None


# --- from bytes to fields ---------------------------------------------------


def _fields(line: bytes | None) -> dict[str, Any]:
    if line is None:
        raise BadLine(
            LineIssueCode.TOO_LONG, "", "has more than 16 MiB: split it into several lines"
        )
    try:
        # Python refuses to convert whole numbers of over 4300 digits; no field is a number.
        value = json.loads(
            line.decode(), object_pairs_hook=_unique, parse_int=float, parse_constant=_no_constant
        )
    except UnicodeDecodeError as error:
        raise BadLine(
            LineIssueCode.NOT_UTF8,
            "",
            f"is not UTF-8 at byte {error.start + 1}: save the file as UTF-8",
        ) from error
    except json.JSONDecodeError as error:
        if not line.strip():
            raise BadLine(
                LineIssueCode.EMPTY, "", "is empty: delete it, or put one JSON object on it"
            ) from error
        raise BadLine(
            LineIssueCode.NOT_JSON,
            "",
            f"is not JSON: {error.msg} at character {error.pos + 1}; put one whole JSON object on "
            "each line",
        ) from error
    except RecursionError as error:
        raise BadLine(
            LineIssueCode.NOT_JSON, "", "is nested too deep: leave out what is not trained on"
        ) from error
    if not isinstance(value, dict):
        raise BadLine(
            LineIssueCode.NOT_OBJECT,
            "",
            f"is {_kind(value)}, not a JSON object: put one JSON object on each line",
        )
    return value


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """An object, unless the last of two equal names would hide the first."""
    fields = dict(pairs)
    if len(fields) != len(pairs):
        counts = Counter(name for name, _ in pairs)
        twice = next(name for name, count in counts.items() if count > 1)
        raise BadLine(
            LineIssueCode.NOT_JSON, "", f"names {_quoted(twice)} twice: leave one of them out"
        )
    return fields


def _no_constant(name: str) -> None:
    raise BadLine(
        LineIssueCode.NOT_JSON, "", f"holds {name}, which is not JSON: write null, or leave it out"
    )


# --- from fields to turns ---------------------------------------------------


def _turns(fields: Mapping[str, Any], format: DatasetFormat | None) -> list[Turn]:
    match format:
        case DatasetFormat.CHAT:
            return _chat(_required(fields, "messages", format))
        case DatasetFormat.PROMPT_COMPLETION:
            prompt = _text(_required(fields, "prompt", format), "prompt")
            return _exchange(prompt, fields, "completion", format)
        case DatasetFormat.ALPACA:
            instruction = _text(_required(fields, "instruction", format), "instruction")
            more = fields.get("input")
            given = "" if more is None else _text(more, "input")
            prompt = f"{instruction}\n\n{given}" if given else instruction
            return _exchange(prompt, fields, "output", format)
        case None:
            raise BadLine(
                LineIssueCode.FIELD_MISSING,
                "",
                "has the fields of no format: give it "
                + ", or ".join(" and ".join(names) for names in REQUIRED.values()),
            )


def _exchange(
    prompt: str, fields: Mapping[str, Any], name: str, format: DatasetFormat
) -> list[Turn]:
    answer = _text(_required(fields, name, format), name)
    if not answer.strip():
        raise _empty(name)
    return [Turn(USER, prompt), Turn(ASSISTANT, answer)]


def _chat(messages: Any) -> list[Turn]:
    if not isinstance(messages, list):
        raise _wrong_type("messages", messages, "a JSON array of messages")
    turns = [_turn(message, f"messages[{i}]", i) for i, message in enumerate(messages)]
    if not turns or turns[-1].role != ASSISTANT:
        raise BadLine(
            LineIssueCode.NO_TARGET,
            f"messages[{len(turns) - 1}].role" if turns else "messages",
            "the last message has to be the assistant's, which is what is trained: add the answer, "
            "or leave out what follows it",
        )
    if len(turns) == 1:
        raise BadLine(
            LineIssueCode.WRONG_ROLE,
            "messages[0].role",
            "the assistant answers nothing: put a user message before it",
        )
    return turns


def _turn(message: Any, path: str, index: int) -> Turn:
    if not isinstance(message, dict):
        raise _wrong_type(path, message, "a JSON object with role and content")
    for name in ("role", "content"):
        if name not in message:
            raise BadLine(
                LineIssueCode.FIELD_MISSING,
                f"{path}.{name}",
                f"is not there: give each message a role and a content{_other_names(message)}",
            )
    role, content = message["role"], message["content"]
    if not isinstance(role, str):
        raise _wrong_type(f"{path}.role", role, "a JSON string")
    if role not in ROLES:
        raise BadLine(
            LineIssueCode.WRONG_ROLE,
            f"{path}.role",
            f"{_quoted(role)} is no role: write one of {', '.join(ROLES)}",
        )
    if role == SYSTEM and index:
        raise BadLine(
            LineIssueCode.WRONG_ROLE,
            f"{path}.role",
            "a system message has to be the first: move it there, or make it the user's",
        )
    text = _text(content, f"{path}.content")
    if role == ASSISTANT and not text.strip():
        raise _empty(f"{path}.content")
    return Turn(role, text)


def _other_names(message: Mapping[str, Any]) -> str:
    return ", not from and value" if "from" in message and "value" in message else ""


def _required(fields: Mapping[str, Any], name: str, format: DatasetFormat) -> Any:
    if name in fields:
        return fields[name]
    other = _named(fields)
    looks = f"; it looks like {other.name}: put that into a dataset of its own" if other else ""
    raise BadLine(
        LineIssueCode.FIELD_MISSING,
        name,
        f"is not there: the lines are read as {format.name}, "
        f"which has {' and '.join(REQUIRED[format])}{looks}",
    )


def _text(value: Any, field: str) -> str:
    if not isinstance(value, str):
        raise _wrong_type(field, value, "a JSON string")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can write half a character: no tokenizer takes it
        raise BadLine(
            LineIssueCode.NOT_UTF8,
            field,
            f"holds half a character at {error.start + 1} (a lone surrogate): write it whole",
        ) from error
    return value


def _empty(field: str) -> BadLine:
    return BadLine(
        LineIssueCode.NO_TARGET,
        field,
        "holds nothing to train on: write the answer, or delete the line",
    )


def _wrong_type(field: str, value: Any, wanted: str) -> BadLine:
    hint = ""
    if isinstance(value, list):
        hint = " (join the texts of its parts)" if field.endswith("content") else ""
    return BadLine(
        LineIssueCode.WRONG_TYPE, field, f"is {_kind(value)}: it has to be {wanted}{hint}"
    )


def _kind(value: Any) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "a truth value"
        case float():
            return "a number"
        case str():
            return "a string"
        case list():
            return "an array"
        case _:
            return "an object"


def _quoted(text: str) -> str:
    return ascii(text[:MAX_QUOTED_CHARACTERS])
