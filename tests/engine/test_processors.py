"""Processors are divided so that each engine has its own, and the gateway one if it can."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import pytest

from engine import processors


@pytest.mark.parametrize("count", range(1, 40))
@pytest.mark.parametrize("shards", [1, 2, 3, 7, 8])
def test_each_has_its_own_neighbours_and_as_many_as_the_others(count: int, shards: int) -> None:
    if count < shards:
        with pytest.raises(ValueError, match=f"{shards} shards on {count} processors"):
            processors.divide(list(range(count)), shards)
        return
    shares = processors.divide(list(range(count)), shards)
    used = list(itertools.chain(*shares))
    assert used == list(range(count - (count > shards))), "one is left where there are enough"
    sizes = {len(share) for share in shares}
    assert min(sizes) >= 1 and max(sizes) - min(sizes) <= 1


def test_one_thread_of_each_core_is_taken_where_there_are_cores_for_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Threads 0 and 4 are one core, and so on."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)))
    monkeypatch.setattr(
        Path,
        "read_text",
        lambda path: f"{int(path.parts[5][3:]) % 4},{int(path.parts[5][3:]) % 4 + 4}\n",
    )
    assert processors.shares(2) == [(4,), (5, 6)]
    assert processors.shares(4) == [(4,), (5,), (6,), (7,)]
    assert processors.shares(5) == [(0,), (1,), (2, 3), (4,), (5, 6)], "threads: few cores"
    with pytest.raises(ValueError, match="9 shards on 8 processors"):
        processors.shares(9)


def test_where_cores_are_not_told_each_processor_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    def not_told(path: object) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {3, 1})
    monkeypatch.setattr(Path, "read_text", not_told)
    assert processors.shares(2) == [(1,), (3,)]
