"""Each line becomes turns, or is told with its field and what to do."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.formats import ROLES, BadLine, Turn, detect, parse
from trainer.spec import DatasetFormat

CHAT, PAIR, ALPACA = (
    DatasetFormat.CHAT,
    DatasetFormat.PROMPT_COMPLETION,
    DatasetFormat.ALPACA,
)


def line(value: Any) -> bytes:
    return json.dumps(value).encode()


def chat(*turns: tuple[Any, Any]) -> bytes:
    return line({"messages": [{"role": role, "content": content} for role, content in turns]})


def refused(data: bytes | None, format: DatasetFormat | None = CHAT) -> tuple[str, str, str]:
    """Code, field and message of what is wrong with it."""
    with pytest.raises(BadLine) as caught:
        parse(data, format)
    assert str(caught.value) == caught.value.message
    caught.value.message.encode()  # can be told
    return caught.value.code.name, caught.value.field, caught.value.message


# --- what is read -----------------------------------------------------------


def test_a_chat_is_read_with_all_its_turns() -> None:
    turns = [("system", "be brief"), ("user", "2+2?"), ("tool", ""), ("assistant", " 4\n")]
    assert parse(chat(*turns), CHAT) == turns


def test_a_prompt_and_its_completion_are_one_exchange() -> None:
    data = line({"prompt": "2+2?", "completion": " 4"})
    assert parse(data, PAIR) == [("user", "2+2?"), ("assistant", " 4")]


@pytest.mark.parametrize(
    ("fields", "asked"),
    [
        ({}, "Add."),
        ({"input": None}, "Add."),
        ({"input": ""}, "Add."),
        ({"input": "2"}, "Add.\n\n2"),
    ],
)
def test_alpaca_puts_the_input_after_an_empty_line(fields: dict[str, Any], asked: str) -> None:
    data = line({"instruction": "Add.", "output": "4", **fields})
    assert parse(data, ALPACA) == [("user", asked), ("assistant", "4")]


def test_fields_of_others_are_ignored() -> None:
    message = {"role": "user", "content": "hi", "name": "bob", "weight": [0, {"deep": None}]}
    answer = {"role": "assistant", "content": "yo", "tool_calls": []}
    big = b'{"id": ' + b"9" * 5000 + b', "messages": ' + line([message, answer]) + b"}"
    assert parse(big, CHAT) == [("user", "hi"), ("assistant", "yo")]


texts = st.text(st.characters(exclude_categories=["Cs"]))
answers = texts.filter(str.strip)
middles = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(["user", "tool"]), texts),
        st.tuples(st.just("assistant"), answers),
    ),
    min_size=1,
    max_size=5,
)


@given(middles, answers, st.booleans(), st.booleans())
def test_any_text_of_a_chat_is_read_as_it_was_written(
    before: list[tuple[str, str]], answer: str, ascii_only: bool, with_system: bool
) -> None:
    turns = [*([("system", answer)] if with_system else []), *before, ("assistant", answer)]
    value = {"messages": [{"role": role, "content": content} for role, content in turns]}
    assert parse(json.dumps(value, ensure_ascii=ascii_only).encode(), CHAT) == turns


@given(st.binary(max_size=60), st.sampled_from([*DatasetFormat, None]))
def test_any_bytes_are_read_or_refused(data: bytes, format: DatasetFormat | None) -> None:
    try:
        assert all(isinstance(turn, Turn) for turn in parse(data, format))
    except BadLine as error:
        assert error.message


values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=3) | st.sampled_from(ROLES),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["messages", "role", "content", "prompt", "completion", "instruction", "output"]
            ),
            inner,
            max_size=3,
        )
    ),
    max_leaves=12,
)


@given(values, st.sampled_from([*DatasetFormat, None]))
def test_any_json_is_read_or_refused(value: Any, format: DatasetFormat | None) -> None:
    try:
        turns = parse(line(value), format)
    except BadLine as error:
        error.message.encode()
    else:
        assert turns[-1].role == "assistant" and turns[-1].content.strip()


# --- what is wrong ----------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "code", "said"),
    [
        (b"", "EMPTY", "delete it"),
        (b"  \t", "EMPTY", "delete it"),
        (None, "TOO_LONG", "more than 16 MiB"),
        (b'{"messages": "\xff"}', "NOT_UTF8", "at byte 15"),
        ("{}".encode("utf-16"), "NOT_UTF8", "save the file as UTF-8"),
        (b'{"messages": [', "NOT_JSON", "at character 15"),
        (b"{} {}", "NOT_JSON", "one whole JSON object"),
        (b'{"a": NaN}', "NOT_JSON", "holds NaN"),
        (b'{"a": -Infinity}', "NOT_JSON", "holds -Infinity"),
        (b'{"a": 1, "a": 2}', "NOT_JSON", "names 'a' twice"),
        (b'{"a": {"b\\ud800": 1, "b\\ud800": 2}}', "NOT_JSON", r"names 'b\ud800' twice"),
        (b"[" * 100_000, "NOT_JSON", "too deep"),
        (b'{"a":' * 100_000, "NOT_JSON", "too deep"),
        (b"[]", "NOT_OBJECT", "is an array"),
        (b"null", "NOT_OBJECT", "is null"),
        (b"7", "NOT_OBJECT", "is a number"),
        (b"true", "NOT_OBJECT", "is a truth value"),
        (b'"{}"', "NOT_OBJECT", "is a string"),
    ],
)
def test_a_line_that_is_no_object_is_told(data: bytes | None, code: str, said: str) -> None:
    found, field, message = refused(data)
    assert (found, field) == (code, "")
    assert said in message


@pytest.mark.parametrize(
    ("data", "code", "field", "said"),
    [
        (line({}), "FIELD_MISSING", "messages", "read as CHAT, which has messages"),
        (line({"messages": None}), "WRONG_TYPE", "messages", "is null"),
        (line({"messages": {}}), "WRONG_TYPE", "messages", "JSON array"),
        (line({"messages": []}), "NO_TARGET", "messages", "add the answer"),
        (line({"messages": ["hi"]}), "WRONG_TYPE", "messages[0]", "with role and content"),
        (
            line({"messages": [{"role": "user"}]}),
            "FIELD_MISSING",
            "messages[0].content",
            "not there",
        ),
        (
            line({"messages": [{"from": "human", "value": "hi"}]}),
            "FIELD_MISSING",
            "messages[0].role",
            "not from and value",
        ),
        (chat((7, "hi")), "WRONG_TYPE", "messages[0].role", "is a number"),
        (chat(("user", "hi"), ("bot", "yo")), "WRONG_ROLE", "messages[1].role", "'bot' is no role"),
        (chat(("\ud800", "hi")), "WRONG_ROLE", "messages[0].role", r"'\ud800' is no role"),
        (
            chat(("user", "hi"), ("system", "no")),
            "WRONG_ROLE",
            "messages[1].role",
            "has to be the first",
        ),
        (chat(("assistant", "hi")), "WRONG_ROLE", "messages[0].role", "answers nothing"),
        (chat(("user", None)), "WRONG_TYPE", "messages[0].content", "is null"),
        (chat(("user", 1)), "WRONG_TYPE", "messages[0].content", "is a number"),
        (chat(("user", [{"text": "a"}])), "WRONG_TYPE", "messages[0].content", "join the texts"),
        (chat(("user", "a\udfff")), "NOT_UTF8", "messages[0].content", "half a character at 2"),
        (chat(("user", "a")), "NO_TARGET", "messages[0].role", "add the answer"),
        (
            chat(("user", "a"), ("assistant", "b"), ("user", "c")),
            "NO_TARGET",
            "messages[2].role",
            "leave out what follows it",
        ),
        (chat(("user", "a"), ("assistant", "")), "NO_TARGET", "messages[1].content", "write the"),
        (
            chat(("user", "a"), ("assistant", " \n")),
            "NO_TARGET",
            "messages[1].content",
            "write the",
        ),
    ],
)
def test_a_chat_that_cannot_be_trained_is_told(
    data: bytes, code: str, field: str, said: str
) -> None:
    assert refused(data)[:2] == (code, field)
    assert said in refused(data)[2]


@pytest.mark.parametrize(
    ("value", "format", "code", "field"),
    [
        ({"prompt": "a"}, PAIR, "FIELD_MISSING", "completion"),
        ({"completion": "a"}, PAIR, "FIELD_MISSING", "prompt"),
        ({"prompt": ["a"], "completion": "b"}, PAIR, "WRONG_TYPE", "prompt"),
        ({"prompt": "a", "completion": None}, PAIR, "WRONG_TYPE", "completion"),
        ({"prompt": "a", "completion": " "}, PAIR, "NO_TARGET", "completion"),
        ({"prompt": "a", "completion": "\ud83d"}, PAIR, "NOT_UTF8", "completion"),
        ({"output": "a"}, ALPACA, "FIELD_MISSING", "instruction"),
        ({"instruction": "a"}, ALPACA, "FIELD_MISSING", "output"),
        ({"instruction": "a", "output": ""}, ALPACA, "NO_TARGET", "output"),
        ({"instruction": "a", "input": 3, "output": "b"}, ALPACA, "WRONG_TYPE", "input"),
        ({"text": "a"}, None, "FIELD_MISSING", ""),
    ],
)
def test_fields_of_the_other_formats_are_told(
    value: Any, format: DatasetFormat | None, code: str, field: str
) -> None:
    assert refused(line(value), format)[:2] == (code, field)


def test_a_line_of_another_format_says_what_the_file_is_read_as() -> None:
    code, field, message = refused(line({"prompt": "a", "completion": "b"}), CHAT)
    assert (code, field) == ("FIELD_MISSING", "messages")
    assert "read as CHAT" in message and "looks like PROMPT_COMPLETION" in message


def test_a_file_that_tells_no_format_is_told_all_of_them() -> None:
    message = refused(line({"text": "a"}), None)[2]
    assert "messages, or prompt and completion, or instruction and output" in message


# --- which format -----------------------------------------------------------

GOOD_CHAT = chat(("user", "a"), ("assistant", "b"))
GOOD_PAIR = line({"prompt": "a", "completion": "b"})
GOOD_ALPACA = line({"instruction": "a", "output": "b"})


@pytest.mark.parametrize(
    ("lines", "format"),
    [
        ([GOOD_CHAT], CHAT),
        ([GOOD_PAIR], PAIR),
        ([GOOD_ALPACA], ALPACA),
        ([b"", None, b"{", line({"id": 1}), GOOD_PAIR, GOOD_CHAT], PAIR),
        ([line({"messages": 7}), GOOD_ALPACA], ALPACA),
        ([line({"messages": 7}), line({"id": 1})], CHAT),
        ([line({"messages": [], "prompt": "a", "completion": "b"})], CHAT),
        ([line({"text": "a"})] * 3, None),
        ([], None),
        ([b"{}"] * 1000 + [GOOD_CHAT], None),
    ],
)
def test_the_first_good_line_tells_the_format(
    lines: list[bytes | None], format: DatasetFormat | None
) -> None:
    assert detect(lines) is format
