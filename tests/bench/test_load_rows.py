"""What the benchmark of loads makes of its figures."""

from __future__ import annotations

import math

import pytest

from tests.bench.load_rows import NONE, STAGED, VLLM, Rows, percentile


def rows(staged_s: float) -> Rows:
    found = Rows(warm_s=[0.010, 0.012, 0.011], cached_s=[0.021], answers_equal=[True, False])
    for _ in range(3):
        found.rows[NONE].add_gaps([0.005] * 999 + [0.010] * 2)
        found.rows[VLLM].add_gaps([0.005] * 999 + [0.080] * 2)
        found.rows[STAGED].add_gaps([0.005] * 999 + [staged_s] * 2)
    found.rows[VLLM].loads_s = [0.070]
    found.rows[VLLM].first_tokens_s = [0.111]
    return found


@pytest.mark.parametrize(
    ("share", "expected"), [(0.0, 1.0), (0.5, 2.0), (0.51, 3.0), (0.75, 3.0), (1.0, 4.0)]
)
def test_a_percentile_is_one_of_the_values(share: float, expected: float) -> None:
    assert percentile([4.0, 1.0, 3.0, 2.0], share) == expected
    assert math.isnan(percentile([], share))


def test_each_round_is_compared_with_its_own_without_loads() -> None:
    found = rows(0.014)
    assert found.gap_ratio(VLLM) == pytest.approx(8.0)
    assert found.gap_ratio(STAGED) == pytest.approx(1.4)
    found.rows[NONE].rounds_s = [0.010, 0.080, 0.080]
    assert found.gap_ratio(VLLM) == pytest.approx(1.0), "the median of the rounds"


def test_a_target_is_reached_or_missed() -> None:
    assert rows(0.015).verdict().endswith("reached, 1.50")
    assert rows(0.016).verdict().endswith("MISSED, 1.60")


def test_the_table_shows_what_was_measured() -> None:
    lines = rows(0.014).table().splitlines()
    assert lines[1].split() == ["no", "loads", "5.00", "5.00", "10.00", "10.00"]
    assert lines[2].split()[-6:] == ["5.00", "5.00", "80.00", "80.00", "8.00", "70.0"]
    assert lines[5].split() == ["from", "disk,", "vLLM's", "loader", "100.00", "100.00"]
    assert lines[6].split() == ["from", "host", "memory", "10.00", "10.00"]
    assert lines[7].endswith(": 1 of 2")
    raw = rows(0.014).raw()
    assert raw["rows"][STAGED]["gaps"] == 3003 and raw["rows"][VLLM]["loads"] == [0.070]
