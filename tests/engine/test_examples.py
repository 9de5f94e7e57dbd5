"""A held-out set is read as it was written, and each bad line is named."""

from __future__ import annotations

import codecs
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import InvalidRequest
from engine.examples import (
    MAX_CHAT_MESSAGES,
    MAX_CONTAINS,
    MAX_DATASET_BYTES,
    MAX_EXAMPLES,
    ROLES,
    Example,
    parse_jsonl,
)
from engine.generation import Chat, ChatMessage
from engine.scoring import Scorer


def lines(*values: Any) -> bytes:
    return "".join(json.dumps(value) + "\n" for value in values).encode()


def refusals(data: bytes) -> dict[str, str]:
    """What is said of each field."""
    with pytest.raises(InvalidRequest) as caught:
        parse_jsonl(data)
    return {violation.field: violation.description for violation in caught.value.violations}


# --- what is read -----------------------------------------------------------


def test_all_fields_are_read() -> None:
    chat = {"messages": [{"role": "system", "content": "be brief"}, {"role": "user"}]}
    data = lines(
        {"text": "2 + 2 =", "expected": " 4", "contains": ["4", "four"]},
        {"chat": chat},
        {"text": "hi", "chat": None, "expected": None, "contains": None},
    )
    assert parse_jsonl(data) == [
        Example("2 + 2 =", " 4", ("4", "four")),
        Example(Chat([ChatMessage("system", "be brief"), ChatMessage("user", "")])),
        Example("hi"),
    ]


texts = st.text(st.characters(exclude_categories=["Cs"]))
chats = st.lists(st.builds(ChatMessage, st.sampled_from(ROLES), texts), min_size=1).map(Chat)
examples = st.builds(
    Example,
    texts.filter(bool) | chats,
    st.none() | texts,
    st.lists(texts.filter(bool), max_size=4).map(tuple),
)


def written(example: Example) -> dict[str, Any]:
    """The JSON form of an example."""
    fields: dict[str, Any] = {"contains": example.contains}
    if example.expected is not None:
        fields["expected"] = example.expected
    if isinstance(example.prompt, Chat):
        turns = [{"role": m.role, "content": m.content} for m in example.prompt.messages]
        return fields | {"chat": {"messages": turns}}
    return fields | {"text": example.prompt}


@given(st.lists(examples, min_size=1, max_size=5), st.booleans(), st.sampled_from(["\n", "\r\n"]))
def test_what_was_written_is_read(given: list[Example], ascii_only: bool, ending: str) -> None:
    text = ending.join(json.dumps(written(one), ensure_ascii=ascii_only) for one in given)
    assert parse_jsonl(text.encode()) == given
    assert parse_jsonl(codecs.BOM_UTF8 + text.encode() + ending.encode()) == given


def test_the_largest_set_is_read() -> None:
    assert len(parse_jsonl(b'{"text":"a"}\n' * MAX_EXAMPLES)) == MAX_EXAMPLES


# --- what is refused --------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        (b"{", "is not JSON: Expecting property name"),
        (b"", "is empty"),
        (b"[]", "must be a JSON object"),
        (b'"text"', "must be a JSON object"),
        (b'{"text": "a", "answer": "b"}', "'answer' is unknown; known are text, chat,"),
        (b'{"text": "a", "text": "b"}', "names 'text' twice"),
        (b"{}", "set one of text and chat"),
        (b'{"text": "a", "chat": {"messages": []}}', "set one of text and chat"),
        (b'{"text": ""}', "text: must not be empty"),
        (b'{"text": 5}', "text: must be a JSON string"),
        (b'{"text": ' + b"1" * 5000 + b"}", "text: must be a JSON string"),
        (b'{"text": "a", "expected": ["b"]}', "expected: must be a JSON string"),
        (b'{"text": "a", "expected": "\\ud800"}', "expected: holds a lone surrogate"),
        (b'{"text": "a", "contains": "b"}', "contains: must be a JSON array"),
        (b'{"text": "a", "contains": ["b", 1]}', "contains[1]: must be a JSON string"),
        (b'{"text": "a", "contains": ["b", ""]}', "contains[1]: must not be empty"),
        (b'{"chat": {"messages": []}}', "chat.messages: must not be empty"),
        (b'{"chat": {"messages": {}}}', "chat.messages: must be a JSON array"),
        (b'{"chat": {"turns": []}}', "chat: 'turns' is unknown; known are messages"),
        (b'{"chat": {"messages": [7]}}', "chat.messages[0]: must be a JSON object"),
        (b'{"chat": {"messages": [{"content": "a"}]}}', "chat.messages[0].role: must be a JSON"),
        (b'{"chat": {"messages": [{"role": "pirate"}]}}', "chat.messages[0].role: 'pirate' is"),
        (b'{"text": "\xff"}', "is not UTF-8 at byte 11"),
        (b"[" * 100_000, "is nested too deep"),
    ],
    ids=lambda value: str(value[:40]),
)
def test_a_bad_line_is_named_with_what_is_wrong(line: bytes, sentence: str) -> None:
    said = refusals(b'{"text": "good"}\n' + line + b'\n{"text": "good"}')
    assert list(said) == ["dataset_uri:2"]
    assert said["dataset_uri:2"].startswith(sentence)


def test_all_bad_lines_are_told_at_once() -> None:
    data = b'{"text": "a"}\n{\n{"text": "b"}\n\n{"text": "c"}\nnull\n'
    assert list(refusals(data)) == ["dataset_uri:2", "dataset_uri:4", "dataset_uri:6"]


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    try:
        parse_jsonl(data)
    except InvalidRequest as error:
        assert error.violations


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"", "must have 1 to 10000 lines, has none"),
        (b'{"text":"a"}\n' * (MAX_EXAMPLES + 1), "must have 1 to 10000 lines, has more"),
        (b" " * (MAX_DATASET_BYTES + 1), "may have 16777216 bytes, has more; split it"),
    ],
    ids=["empty", "lines", "bytes"],
)
def test_a_file_has_one_line_to_its_limits(data: bytes, sentence: str) -> None:
    assert refusals(data) == {"dataset_uri": sentence}


# --- what scorers need ------------------------------------------------------


@pytest.mark.parametrize(
    ("example", "served"),
    [
        (Example("a"), {Scorer.VALID_JSON}),
        (Example("a", "b"), set(Scorer)),
        (Example("a", contains=("b",)), {Scorer.VALID_JSON, Scorer.CONTAINS}),
        (Example("a", ""), {Scorer.VALID_JSON, Scorer.EXACT_MATCH}),
        (Example("a", " "), {Scorer.VALID_JSON, Scorer.EXACT_MATCH, Scorer.LOG_LIKELIHOOD}),
    ],
    ids=["nothing", "expected", "contains", "expected is empty", "expected is space"],
)
def test_an_example_serves_the_scorers_that_can_judge_it(
    example: Example, served: set[Scorer]
) -> None:
    assert {scorer for scorer in Scorer if example.serves(scorer)} == served


def test_expected_is_looked_for_where_contains_is_empty() -> None:
    assert Example("a", " Paris\n").wanted == ("Paris",)
    assert Example("a", "Paris", ("Seine",)).wanted == ("Seine",)


def test_what_one_answer_costs_is_limited() -> None:
    (many,) = Example("a", contains=("b",) * (MAX_CONTAINS + 1)).violations()
    assert many == ("contains", "may have 64 entries")
    turns = [ChatMessage("pirate", "arr")] * (MAX_CHAT_MESSAGES + 1)
    (long,) = Example(Chat(turns)).violations()
    assert long == ("chat.messages", "may have 4096 entries")
