"""Chats that are too long are left out, or lose their oldest turns whole."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.trainer.templates import Models, chat_of
from trainer.chat_tokenizer import ChatTokenizer
from trainer.formats import BadLine, Turn
from trainer.masks import Masks
from trainer.overlength import Fit, Overlength
from trainer.spec import DataSpec, LossMask, OverlengthPolicy

TRUNCATE: Mapping[str, Any] = {"overlength": OverlengthPolicy.TRUNCATE_TURNS}


def fit(model: Path, turns: list[Turn], **fields: Any) -> Fit:
    data = DataSpec(**fields).resolved(max_model_len=2048)
    return Overlength(Masks(chat_of(model), LossMask.ASSISTANT), data).fit(turns)


def length(model: Path, turns: list[Turn]) -> int:
    """Tokens of a chat."""
    return len(chat_of(model).encode(chat_of(model).render(turns, prompt=False)))


def talk(exchanges: int, *, system: bool = False) -> list[Turn]:
    turns = [Turn("system", "be brief")] if system else []
    for number in range(exchanges):
        turns += [Turn("user", f"question {number}"), Turn("assistant", f"answer {number}")]
    return turns


@pytest.mark.parametrize("over", [0, 1])
def test_a_row_may_have_as_many_tokens_as_the_limit(tiny: Path, over: int) -> None:
    turns = talk(3)
    tokens = length(tiny, turns)
    found = fit(tiny, turns, max_row_tokens=tokens - over)
    assert (found.row is None) == bool(over)
    assert found.turns_left_out == 0
    if found.row is not None:
        assert len(found.row.ids) == tokens


def test_no_row_is_longer_than_a_sequence(tiny: Path) -> None:
    turns = talk(3)
    assert fit(tiny, turns, max_sequence_tokens=length(tiny, turns) - 1, max_row_tokens=2000) == (
        Fit(None)
    )


@pytest.mark.parametrize("system", [False, True])
@pytest.mark.parametrize("kept", [1, 2, 4])
def test_the_oldest_exchanges_are_left_out_whole(tiny: Path, system: bool, kept: int) -> None:
    turns = talk(5, system=system)
    short = turns[: int(system)] + turns[-2 * kept :]
    found = fit(
        tiny, turns, **TRUNCATE, max_sequence_tokens=length(tiny, short) + 7, reserve_tokens=7
    )
    assert found.row is not None
    assert (list(found.row.turns), found.turns_left_out) == (short, 10 - 2 * kept)
    if kept > 1:
        found = fit(
            tiny, turns, **TRUNCATE, max_sequence_tokens=length(tiny, short) + 6, reserve_tokens=7
        )
        assert found.turns_left_out == 10 - 2 * (kept - 1)


def test_a_row_that_fits_keeps_all_its_turns(tiny: Path) -> None:
    turns = [Turn("assistant", "hello"), *talk(2)]
    found = fit(tiny, turns, **TRUNCATE)
    assert found.row is not None and list(found.row.turns) == turns


@pytest.mark.parametrize("system", [False, True])
def test_a_row_whose_last_exchange_is_too_long_is_left_out(tiny: Path, system: bool) -> None:
    turns = [*talk(2, system=system), Turn("user", "long " * 50), Turn("assistant", "no")]
    short = turns[: int(system)] + turns[-2:]
    limit = length(tiny, short) - 1
    assert fit(tiny, turns, **TRUNCATE, max_sequence_tokens=limit, reserve_tokens=0) == Fit(None)


def test_a_row_begins_with_a_user_turn_after_it_was_shortened(tiny: Path) -> None:
    turns = [Turn("user", "a" * 60), Turn("assistant", "b"), *talk(1)]
    without_first = length(tiny, turns[1:])
    found = fit(tiny, turns, **TRUNCATE, max_sequence_tokens=without_first, reserve_tokens=0)
    assert found.row is not None
    assert list(found.row.turns) == turns[2:]


def test_a_huge_row_is_left_out_without_being_tokenized(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat, encoded = ChatTokenizer(tiny), list[str]()
    masks = Masks(chat, LossMask.ASSISTANT)
    encode = chat.encode

    def counted(text: str) -> Any:
        encoded.append(text)
        return encode(text)

    monkeypatch.setattr(chat, "encode", counted)
    turns = [Turn("user", "x" * 1_000_000), Turn("assistant", "y")]
    assert masks.draft(turns, max_tokens=2048) is None
    assert encoded == []
    assert masks.draft(talk(1), max_tokens=2048) is not None
    assert len(encoded) == 1


def test_what_is_wrong_with_a_shortened_row_names_the_turn_of_the_line(models: Models) -> None:
    turns = [*talk(2), Turn("user", "q"), Turn("assistant", "\nb"), *talk(1)]
    short = length(models("joined"), turns[-4:])
    with pytest.raises(BadLine) as caught:
        fit(models("joined"), turns, **TRUNCATE, max_sequence_tokens=short, reserve_tokens=0)
    assert caught.value.field == "messages[5]"


@settings(max_examples=40, deadline=None)
@given(
    words=st.lists(st.integers(1, 30), min_size=2, max_size=12),
    limit=st.integers(20, 300),
    system=st.booleans(),
)
def test_the_fewest_turns_are_left_out_that_have_to_be(
    tiny: Path, words: list[int], limit: int, system: bool
) -> None:
    turns = [Turn("system", "be brief")] if system else []
    first = len(turns)
    turns += [
        Turn(("user", "assistant")[i % 2], "word " * n)
        for i, n in enumerate(words[: len(words) // 2 * 2])
    ]
    found = fit(tiny, turns, **TRUNCATE, max_sequence_tokens=limit, reserve_tokens=0)
    choices = [[*turns[:first], *turns[i:]] for i in range(first, len(turns), 2)]
    fitting = [choice for choice in choices if length(tiny, choice) <= limit]
    if not fitting:
        assert found == Fit(None)
    else:
        assert found.row is not None
        assert list(found.row.turns) == fitting[0]
        assert found.turns_left_out == len(turns) - len(fitting[0])
