"""Scorers judge as the contract says, and the table compares example by example."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.intervals import Interval, wilson
from engine.scoring import (
    Scorer,
    ScoreTable,
    contains_all,
    exact_match,
    mean_logprob,
    valid_json,
)

EXACT, LIKELIHOOD = Scorer.EXACT_MATCH, Scorer.LOG_LIKELIHOOD


def table(scorer: Scorer, *rows: Sequence[float | None]) -> ScoreTable:
    """A table of one scorer; row k is version k, None an example without a score."""
    made = ScoreTable(range(len(rows)), [scorer], len(rows[0]))
    for version, row in enumerate(rows):
        for example, score in enumerate(row):
            if score is not None:
                made.put(example, version, {scorer: score})
    return made


# --- scorers ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "expected", "score"),
    [
        ("Paris", "Paris", 1),
        (" Paris\n", "Paris", 1),
        ("Paris", "\tParis ", 1),
        ("", " ", 1),
        ("paris", "Paris", 0),
        ("Paris.", "Paris", 0),
        ("New  York", "New York", 0),
    ],
)
def test_an_exact_match_ignores_space_around_alone(
    answer: str, expected: str, score: float
) -> None:
    assert exact_match(answer, expected) == score


@pytest.mark.parametrize(
    ("answer", "wanted", "score"),
    [
        ("Arr, matey!", ["arr", "MATEY"], 1),
        ("Arr!", ["arr", "matey"], 0),
        ("In der Straße", ["STRASSE"], 1),
        ("IN DER STRASSE", ["Straße"], 1),
        ("", ["arr"], 0),
    ],
)
def test_all_wanted_texts_must_be_there_in_any_case(
    answer: str, wanted: list[str], score: float
) -> None:
    assert contains_all(answer, wanted) == score


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(json_values, st.sampled_from(["", " ", "\n\t"]))
def test_any_json_value_is_valid(value: object, space: str) -> None:
    assert valid_json(space + json.dumps(value) + space) == 1


@pytest.mark.parametrize(
    "answer",
    ["", "{", "{} {}", "{'a': 1}", "NaN", "[Infinity]", "[-Infinity]", "01", "yes", '"\n"', "[1,]"],
)
def test_what_is_not_json_is_not(answer: str) -> None:
    assert valid_json(answer) == 0


def test_a_number_of_ten_thousand_digits_is_valid_json() -> None:
    assert valid_json("9" * 10_000) == 1


def test_nesting_beyond_the_parser_is_a_score_and_no_crash() -> None:
    assert valid_json("[" * 100_000 + "]" * 100_000) == 0


def test_a_log_likelihood_is_nats_per_token() -> None:
    assert mean_logprob([-1.0, -2.0, -6.0]) == -3.0


@pytest.mark.parametrize("logprob", [math.nan, -math.inf, math.inf])
def test_a_log_likelihood_that_is_no_number_is_refused(logprob: float) -> None:
    with pytest.raises(ValueError, match="NaN or infinity"):
        mean_logprob([-1.0, logprob])


def test_no_token_has_no_log_likelihood() -> None:
    with pytest.raises(ValueError, match="no token"):
        mean_logprob([])


# --- versions by themselves -------------------------------------------------


def test_a_share_has_wilsons_interval() -> None:
    (score,) = table(EXACT, [1, 1, 0, 1]).scores()
    assert (score.version, score.scorer, score.mean, score.count) == (0, EXACT, 0.75, 4)
    assert score.interval == wilson(3, 4)


def test_a_mean_has_students_interval() -> None:
    (score,) = table(LIKELIHOOD, [-1.0, -2.0, -3.0]).scores()
    assert (score.mean, score.count) == (-2.0, 3)
    half = 4.302653 * 1 / math.sqrt(3)
    assert score.interval == pytest.approx((-2 - half, -2 + half), abs=1e-6)


def test_one_mean_alone_is_unbounded() -> None:
    (score,) = table(LIKELIHOOD, [-1.5]).scores()
    assert score.mean == -1.5
    assert score.interval == Interval(-math.inf, math.inf)


def test_examples_without_a_score_do_not_count() -> None:
    (score,) = table(EXACT, [1, None, 0, None]).scores()
    assert (score.mean, score.count) == (0.5, 2)


def test_a_version_without_a_score_is_left_out() -> None:
    made = table(EXACT, [1, 0], [None, None])
    assert [score.version for score in made.scores()] == [0]
    assert made.differences() == []


def test_versions_and_scorers_come_as_they_were_given() -> None:
    made = ScoreTable([7, 0], [LIKELIHOOD, EXACT], 1)
    for version in (0, 7):
        made.put(0, version, {EXACT: 1.0, LIKELIHOOD: -0.5})
    order = [(score.version, score.scorer) for score in made.scores()]
    assert order == [(7, LIKELIHOOD), (7, EXACT), (0, LIKELIHOOD), (0, EXACT)]
    differences = [(score.version, score.scorer) for score in made.differences()]
    assert differences == [(0, LIKELIHOOD), (0, EXACT)]


# --- differences ------------------------------------------------------------


def test_a_difference_is_over_the_examples_that_both_answered() -> None:
    (difference,) = table(EXACT, [0, 0, 1, None, 1], [1, 1, 1, 1, None]).differences()
    assert difference.version == 1
    assert difference.difference == pytest.approx(2 / 3)


def test_versions_that_share_no_example_are_not_compared() -> None:
    assert table(EXACT, [1, None], [None, 0]).differences() == []


def test_a_better_version_is_above_0_and_significant() -> None:
    (share,) = table(EXACT, [0] * 20 + [1] * 5, [1] * 25).differences()
    assert share.difference == 0.8
    assert share.interval.low > 0
    assert share.significant
    (mean,) = table(LIKELIHOOD, [-2.0, -3.0, -4.0], [-1.0, -2.1, -2.9]).differences()
    assert mean.difference == pytest.approx(1.0)
    assert mean.significant


def test_a_worse_version_is_below_0() -> None:
    (difference,) = table(EXACT, [1] * 25, [0] * 20 + [1] * 5).differences()
    assert difference.difference == -0.8
    assert difference.interval.high < 0


@pytest.mark.parametrize("scorer", [EXACT, LIKELIHOOD])
def test_equal_answers_are_no_difference(scorer: Scorer) -> None:
    (difference,) = table(scorer, [0, 1, 1, 0, 1], [0, 1, 1, 0, 1]).differences()
    assert difference.difference == 0.0
    assert not difference.significant


def test_pairing_finds_what_the_means_alone_hide() -> None:
    """Examples differ by nats, the versions by a tenth of one: each mean is unsure, the
    difference is not."""
    draw = random.Random(3)
    before: list[float | None] = [draw.uniform(-8, 0) for _ in range(40)]
    after: list[float | None] = [
        score + draw.gauss(0.1, 0.05) for score in before if score is not None
    ]
    made = table(LIKELIHOOD, before, after)
    one, other = made.scores()
    assert one.interval.low < other.mean < one.interval.high
    (difference,) = made.differences()
    assert difference.significant
    assert difference.interval.low < 0.1 < difference.interval.high


def test_all_others_are_compared_with_the_first() -> None:
    differences = table(EXACT, [0, 0], [1, 0], [1, 1]).differences()
    assert [(d.version, d.difference) for d in differences] == [(1, 0.5), (2, 1.0)]
