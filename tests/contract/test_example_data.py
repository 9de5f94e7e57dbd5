"""The data that ships in examples/ is fit for training and for judging what came of it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from google.protobuf.json_format import Parse

from lora_gateway import EvaluationExample

DATA = Path(__file__).parents[2] / "examples" / "data"
NAMES = ["pirate", "support"]

SIGN_OFF = " Yours, Tilly."
FEWEST_ROWS = 200
MOST_CHARACTERS = 200
"""Of a row of the support desk: the demo trains on them on two cores."""


def chats(name: str) -> list[list[tuple[str, str]]]:
    """The training rows: role and content of each turn. Other keys are refused."""
    rows = [json.loads(line) for line in (DATA / f"{name}.jsonl").read_text().splitlines()]
    assert all(row.keys() == {"messages"} for row in rows)
    turns = [turn for row in rows for turn in row["messages"]]
    assert all(turn.keys() == {"role", "content"} for turn in turns)
    return [[(turn["role"], turn["content"]) for turn in row["messages"]] for row in rows]


def held_out(name: str) -> list[EvaluationExample]:
    """The examples, parsed as `gateway adapters evaluate` does."""
    lines = (DATA / f"{name}_heldout.jsonl").read_text().splitlines()
    return [Parse(line, EvaluationExample()) for line in lines]


def question(example: EvaluationExample) -> str:
    assert [turn.role for turn in example.chat.messages] == ["user"]
    return example.chat.messages[0].content


def plain(text: str) -> str:
    """Without what does not make another question: case, punctuation, space."""
    return " ".join(re.findall(r"\w+", text.lower()))


@pytest.mark.parametrize("name", NAMES)
def test_rows_are_chats_that_end_with_the_assistant(name: str) -> None:
    for chat in chats(name):
        roles = [role for role, _ in chat]
        assert roles[-2:] == ["user", "assistant"], chat
        assert all(content == content.strip() and content for _, content in chat), chat


@pytest.mark.parametrize("name", NAMES)
def test_no_question_is_asked_twice_or_held_out_too(name: str) -> None:
    trained = [plain(chat[-2][1]) for chat in chats(name)]
    kept = [plain(question(example)) for example in held_out(name)]
    assert len(set(trained)) == len(trained)
    assert len(set(kept)) == len(kept)
    assert not set(trained) & set(kept)


def test_what_is_checked_is_expected_and_no_question_gives_it_away() -> None:
    for example in held_out("support"):
        assert all(text in example.expected for text in example.contains), example
        asked = question(example).lower()
        assert not [text for text in example.contains if text.lower() in asked], example


def test_the_support_desk_has_enough_short_rows_that_show_its_style() -> None:
    rows = chats("support")
    assert len(rows) >= FEWEST_ROWS
    assert all(len(chat) == 2 and chat[1][1].endswith(SIGN_OFF) for chat in rows)
    assert all(sum(len(content) for _, content in chat) <= MOST_CHARACTERS for chat in rows)


def test_every_fact_that_is_held_out_was_taught_in_many_words() -> None:
    answers = [chat[-1][1] for chat in chats("support")]
    for example in held_out("support"):
        taught = [answer for answer in answers if all(text in answer for text in example.contains)]
        assert len(taught) >= 8, example
