from itertools import pairwise

import pytest

from tests.bench.comparison import compare_first_tokens, compare_throughput, in_turn
from tests.bench.front_end import CallsFailed, Kind, check_tokens
from tests.bench.workload import ADAPTER, Round, Workload

WORKLOAD = Workload((1, 2), "", requests=40, in_flight=4, tokens=8)


class ScriptedSide:
    """A front end that does a round in this time, and notes who was asked."""

    def __init__(
        self,
        kind: Kind,
        seconds: float,
        asked: list[tuple[Kind, int]],
        text: str = "a",
        base_only: bool = False,
    ) -> None:
        self.kind = kind
        self._seconds = seconds
        self._asked = asked
        self._text = text
        self._base_only = base_only

    def serves(self, adapter: str) -> bool:
        return not (adapter and self._base_only)

    def round(self, workload: Workload) -> Round:
        self._asked.append((self.kind, workload.requests))
        return Round(workload.requests * workload.tokens, self._seconds)

    def first_tokens(self, workload: Workload) -> list[float]:
        return [self._seconds] * 3

    def text(self, workload: Workload) -> str:
        return self._text


def test_sides_are_measured_in_turns_after_a_warm_up() -> None:
    asked: list[tuple[Kind, int]] = []
    sides = [
        ScriptedSide(kind, seconds, asked)
        for kind, seconds in ((Kind.GENERATE, 2.0), (Kind.GATEWAY, 4.0))
    ]
    measured = compare_throughput(sides, WORKLOAD, rounds=4)
    bare, served = Kind.GENERATE, Kind.GATEWAY
    assert asked[:2] == [(bare, 4), (served, 4)]
    assert [kind for kind, _ in asked[2:]] == [
        bare,
        served,
        served,
        bare,
        served,
        bare,
        bare,
        served,
    ]
    assert {requests for _, requests in asked[2:]} == {40}
    assert measured.requests_per_s == {bare: [20.0] * 4, served: [10.0] * 4}
    assert measured.ratio(served, bare) == 0.5
    assert measured.ratios(served, bare) == [0.5] * 4


def test_a_side_that_lacks_the_adapter_is_left_out_of_its_cases_alone() -> None:
    sides = [
        ScriptedSide(Kind.GATEWAY, 1.0, []),
        ScriptedSide(Kind.RUST_HTTP, 1.0, [], base_only=True),
    ]
    with_adapter = Workload((1, 2), ADAPTER, requests=4, in_flight=4, tokens=8)
    assert set(compare_throughput(sides, with_adapter, 3).requests_per_s) == {Kind.GATEWAY}
    assert set(compare_first_tokens("ids", sides, with_adapter, 3).blocks_s) == {Kind.GATEWAY}
    assert set(compare_throughput(sides, WORKLOAD, 3).requests_per_s) == {
        Kind.GATEWAY,
        Kind.RUST_HTTP,
    }


@pytest.mark.parametrize("text", ["a", "b"])
def test_answers_that_differ_are_noticed(text: str) -> None:
    sides = [
        ScriptedSide(Kind.GATEWAY, 1.0, []),
        ScriptedSide(Kind.PYTHON_HTTP, 1.0, [], text=text),
    ]
    unlike = compare_throughput(sides, WORKLOAD, 3).unlike
    assert unlike == ([] if text == "a" else [Kind.PYTHON_HTTP])


@pytest.mark.parametrize("count", [2, 3, 4, 5])
def test_no_side_always_follows_the_same_other(count: int) -> None:
    sides = list(range(count))
    turns = [list(in_turn(sides, turn)) for turn in range(2 * count)]
    assert all(sorted(turn) == sides for turn in turns)
    for side in sides:
        assert sum(turn[0] == side for turn in turns) == 2
        followed = {before for turn in turns for before, after in pairwise(turn) if after == side}
        assert len(followed) == min(2, count - 1)


def test_what_is_added_to_first_tokens_is_the_difference_of_medians() -> None:
    sides = [ScriptedSide(Kind.GENERATE, 0.010, []), ScriptedSide(Kind.GATEWAY, 0.012, [])]
    timed = compare_first_tokens("ids", sides, WORKLOAD, blocks=2)
    assert timed.added_s(Kind.GATEWAY, Kind.GENERATE) == pytest.approx(0.002)
    assert timed.added_by_block_s(Kind.GATEWAY, Kind.GENERATE) == pytest.approx([0.002] * 2)


def test_tokens_that_are_missing_are_not_passed_over() -> None:
    check_tokens(WORKLOAD, 320)
    with pytest.raises(CallsFailed, match="319 tokens came of 320"):
        check_tokens(WORKLOAD, 319)
