"""Limits of sampling parameters: the edges are in, what lies beyond is named."""

from __future__ import annotations

import math
from typing import Any

import pytest

from engine.sampling import violations

VOCAB_SIZE = 100
GREATEST = 2**31 - 1
NAN, INFINITE = math.nan, math.inf


def wrong(**sampling: Any) -> dict[str, str]:
    """What is wrong, by field."""
    found = violations(sampling, vocab_size=VOCAB_SIZE, prefix="sampling")
    assert all(violation.field.startswith("sampling.") for violation in found)
    return {v.field.removeprefix("sampling."): v.description for v in found}


def repetition(
    max_pattern_size: int = 8, min_pattern_size: int = 1, min_count: int = 3
) -> dict[str, int]:
    return {
        "max_pattern_size": max_pattern_size,
        "min_pattern_size": min_pattern_size,
        "min_count": min_count,
    }


def test_nothing_that_is_set_is_nothing_that_is_wrong() -> None:
    assert not wrong()


@pytest.mark.parametrize(
    ("name", "allowed", "refused"),
    [
        ("n", [1, 64], [0, 65]),
        ("max_tokens", [1, GREATEST], [0, GREATEST + 1]),
        ("min_tokens", [0, GREATEST], [GREATEST + 1]),
        ("temperature", [0.0, 2.0], [-0.1, 2.1, NAN, INFINITE, -INFINITE]),
        ("top_p", [1e-9, 1.0], [0.0, -0.1, 1.1, NAN, INFINITE]),
        ("top_k", [0, 1, GREATEST], [GREATEST + 1]),
        ("min_p", [0.0, 1.0], [-0.1, 1.1, NAN]),
        ("presence_penalty", [-2.0, 2.0], [-2.1, 2.1, NAN, INFINITE]),
        ("frequency_penalty", [-2.0, 2.0], [-2.1, 2.1, NAN, INFINITE]),
        ("repetition_penalty", [1e-9, 1e9], [0.0, -1.0, NAN, INFINITE]),
        ("logprobs", [0, 20], [21]),
        ("prompt_logprobs", [0, 20], [21]),
        ("seed", [-(2**63), -2, 0, 2**63 - 1], [-1]),
    ],
)
def test_a_number_may_reach_its_limits_and_not_pass_them(
    name: str, allowed: list[float], refused: list[float]
) -> None:
    for value in allowed:
        assert not wrong(**{name: value}), value
    for value in refused:
        assert list(wrong(**{name: value})) == [name], value


def test_a_violation_says_what_is_allowed_and_what_was_given() -> None:
    assert wrong(top_p=0.0) == {"top_p": "must be in (0, 1], is 0"}
    assert wrong(temperature=3.5) == {"temperature": "must be in [0, 2], is 3.5"}
    assert wrong(repetition_penalty=NAN) == {
        "repetition_penalty": "must be finite and above 0, is nan"
    }


@pytest.mark.parametrize(
    ("name", "entry", "most"),
    [
        ("stop", "x", 32),
        ("stop_token_ids", 1, 64),
        ("logprob_token_ids", 1, 128),
        ("allowed_token_ids", 1, 1024),
        ("bad_words", "x", 128),
    ],
)
def test_a_list_may_have_so_many_entries(name: str, entry: object, most: int) -> None:
    assert not wrong(**{name: [entry] * most})
    assert wrong(**{name: [entry] * (most + 1)}) == {name: f"may have at most {most} entries"}


def test_the_entries_of_a_list_that_is_too_long_are_not_told_one_by_one() -> None:
    assert list(wrong(stop=[""] * 100_000)) == ["stop"]


def test_a_map_may_have_so_many_entries() -> None:
    biases = dict.fromkeys(range(1025), 0.0)
    found = violations({"logit_bias": biases}, vocab_size=2000, prefix="sampling")
    assert [v.description for v in found] == ["may have at most 1024 entries"]
    del biases[0]
    assert not violations({"logit_bias": biases}, vocab_size=2000, prefix="sampling")


@pytest.mark.parametrize(("name", "most"), [("stop", 1024), ("bad_words", 256)])
def test_a_string_is_bounded_in_bytes_and_not_empty(name: str, most: int) -> None:
    assert not wrong(**{name: ["x" * most, "y"]})
    for text in ("", "x" * (most + 1), "é" * (most // 2 + 1)):
        assert wrong(**{name: ["y", text]}) == {f"{name}[1]": f"must be 1 to {most} bytes"}


def test_bad_words_are_bounded_together() -> None:
    assert not wrong(bad_words=["x" * 240] * 2)
    assert wrong(bad_words=["x" * 240, "y" * 241]) == {"bad_words": "may have 480 bytes together"}


@pytest.mark.parametrize("name", ["stop_token_ids", "logprob_token_ids", "allowed_token_ids"])
def test_a_token_id_lies_in_the_vocabulary(name: str) -> None:
    assert not wrong(**{name: [0, VOCAB_SIZE - 1]})
    assert wrong(**{name: [0, VOCAB_SIZE, VOCAB_SIZE + 1]}) == {
        name: "token ids must be below 100; 100 is not"
    }


def test_a_biased_token_id_lies_in_the_vocabulary() -> None:
    assert not wrong(logit_bias={0: 1.0, VOCAB_SIZE - 1: 1.0})
    assert list(wrong(logit_bias={VOCAB_SIZE: 1.0})) == ["logit_bias"]


def test_a_bias_is_in_range() -> None:
    assert not wrong(logit_bias={1: -100.0, 2: 100.0})
    assert list(wrong(logit_bias={1: 0.0, 2: NAN, 3: -100.5, 4: INFINITE})) == [
        *("logit_bias[2]", "logit_bias[3]", "logit_bias[4]")
    ]


def test_several_greedy_completions_are_refused() -> None:
    assert list(wrong(n=2, temperature=0.0)) == ["n"]
    assert not wrong(n=1, temperature=0.0)
    assert not wrong(n=2, temperature=0.1)


def test_the_seed_of_the_last_completion_fits_too() -> None:
    assert not wrong(n=3, seed=2**63 - 3, temperature=1.0)
    assert list(wrong(n=4, seed=2**63 - 3, temperature=1.0)) == ["seed"]


def test_more_minimum_than_maximum_is_refused() -> None:
    assert not wrong(min_tokens=4, max_tokens=4)
    assert wrong(min_tokens=5, max_tokens=4) == {
        "min_tokens": "must not exceed max_tokens, which is 4"
    }


def test_stop_strings_need_text() -> None:
    assert list(wrong(stop=["x"], detokenize=False)) == ["stop"]
    assert not wrong(stop=["x"], detokenize=True)
    assert not wrong(stop_token_ids=[1], detokenize=False)


def test_logprobs_of_certain_tokens_are_as_many_as_these() -> None:
    assert not wrong(logprob_token_ids=[1, 2])
    assert not wrong(logprob_token_ids=[1, 2], logprobs=2)
    assert wrong(logprob_token_ids=[1, 2], logprobs=3) == {
        "logprobs": "must be unset or 2, the number of logprob_token_ids"
    }


@pytest.mark.parametrize(
    ("detection", "field"),
    [
        (repetition(max_pattern_size=0, min_pattern_size=0), "max_pattern_size"),
        (repetition(max_pattern_size=257), "max_pattern_size"),
        (repetition(max_pattern_size=4, min_pattern_size=5), "min_pattern_size"),
        (repetition(min_count=1), "min_count"),
        (repetition(min_count=257), "min_count"),
    ],
)
def test_repetition_detection_has_its_limits(detection: dict[str, int], field: str) -> None:
    assert list(wrong(repetition_detection=detection)) == [f"repetition_detection.{field}"]


@pytest.mark.parametrize(
    "detection",
    [repetition(), repetition(256, 256, 256), repetition(1, 1, 2)],
    ids=["middle", "most", "least"],
)
def test_repetition_detection_within_its_limits_is_allowed(detection: dict[str, int]) -> None:
    assert not wrong(repetition_detection=detection)


def test_all_that_is_wrong_comes_at_once() -> None:
    found = wrong(temperature=3.0, top_p=0.0, stop=[""], n=0, min_tokens=2, max_tokens=1)
    assert found.keys() == {"temperature", "top_p", "stop[0]", "n", "min_tokens"}
