"""Statistics of rows are exact, and duplicates are found wherever they are."""

from __future__ import annotations

import math
from array import array

from hypothesis import given
from hypothesis import strategies as st

from trainer.report import MAX_ISSUES, TokenStatistics
from trainer.statistics import RowStatistics


def statistics(rows: list[list[int]]) -> RowStatistics:
    found = RowStatistics()
    for number, ids in enumerate(rows, start=1):
        found.add(2 * number, array("i", ids).tobytes(), len(ids), len(ids) // 2)
    return found


def test_no_rows_have_no_statistics() -> None:
    assert RowStatistics().tokens() == TokenStatistics()
    assert RowStatistics().duplicates() == (0, ())


@given(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=40), min_size=1, max_size=30))
def test_lengths_and_duplicates_are_those_of_the_rows(rows: list[list[int]]) -> None:
    found = statistics(rows)
    tokens, lengths = found.tokens(), sorted(map(len, rows))
    assert (tokens.total, tokens.max) == (sum(lengths), lengths[-1])
    assert tokens.trained == sum(n // 2 for n in lengths)
    assert math.isclose(tokens.mean, sum(lengths) / len(rows))
    assert tokens.p50 == lengths[math.ceil(0.5 * len(rows)) - 1]
    assert tokens.p95 == lengths[math.ceil(95 * len(rows) / 100) - 1]
    for bucket in tokens.histogram:
        assert bucket.up_to.bit_count() == 1
        inside = [n for n in lengths if bucket.up_to // 2 < n <= bucket.up_to]
        assert bucket.rows == len(inside) > 0
    assert sum(bucket.rows for bucket in tokens.histogram) == found.rows == len(rows)
    repeated = tuple(2 * (i + 1) for i, row in enumerate(rows) if row in rows[:i])
    assert found.duplicates() == (len(repeated), repeated)


def test_the_list_of_duplicates_is_bounded_and_their_number_is_not() -> None:
    count, lines = statistics([[1, 2]] * (MAX_ISSUES + 5)).duplicates()
    assert count == MAX_ISSUES + 4
    assert len(lines) == MAX_ISSUES
    assert lines[:2] == (4, 6)
