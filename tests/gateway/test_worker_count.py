"""The number of workers where nobody has said."""

from __future__ import annotations

import pytest

from gateway import worker_count
from gateway.worker_count import MAX_WORKERS, default_workers


@pytest.mark.parametrize("shards", [1, 2, 8])
@pytest.mark.parametrize("processors", [1, 2, 64])
def test_engines_on_the_cpu_leave_room_for_one(shards: int, processors: int) -> None:
    assert default_workers(shards, 0, processors) == 1


@pytest.mark.parametrize(("shards", "workers"), [(1, 2), (2, 4), (8, 16)])
def test_a_core_on_a_gpu_gives_more_than_one_worker_streams(shards: int, workers: int) -> None:
    assert default_workers(shards, 1, 128) == workers


@pytest.mark.parametrize(
    ("shards", "processors", "workers"), [(1, 3, 2), (1, 2, 1), (4, 10, 6), (8, 16, 8)]
)
def test_each_worker_has_a_processor_beside_those_of_the_cores(
    shards: int, processors: int, workers: int
) -> None:
    assert default_workers(shards, 1, processors) == workers


def test_a_shard_of_several_gpus_has_a_process_for_each() -> None:
    assert default_workers(2, 4, 12) == 2


@pytest.mark.parametrize("processors", [1, 2, 3])
def test_there_is_one_however_few_processors_there_are(processors: int) -> None:
    assert default_workers(2, 1, processors) == 1


def test_there_are_never_more_than_may_be_asked_for() -> None:
    assert default_workers(64, 1, 1024) == MAX_WORKERS


def test_a_faster_worker_makes_them_fewer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_count, "WORKER_TOKENS_PER_S", 36_000)
    assert (default_workers(1, 1, 128), default_workers(3, 1, 128)) == (1, 3)
