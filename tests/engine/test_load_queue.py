"""In which order versions are loaded."""

from __future__ import annotations

import pytest

from engine import load_queue
from engine.errors import ShardUnavailable
from engine.load_queue import LoadQueue
from tests.engine.stage import A, B, C, D


async def test_those_that_are_awaited_come_first_and_each_in_its_order() -> None:
    queue = LoadQueue()
    for key, awaited in ((A, False), (B, True), (C, False), (D, True)):
        queue.add(key, awaited=awaited)
    order = []
    while (first := queue.next(())) is not None:
        order.append(first)
        queue.take(first)
    assert order == [B, D, A, C]


async def test_one_that_is_wanted_again_keeps_its_place_and_may_be_awaited_now() -> None:
    queue = LoadQueue()
    futures = [queue.add(key, awaited=False) for key in (A, B, C)]
    assert queue.add(B, awaited=True) is futures[1] is queue.future(B)
    assert queue.add(B, awaited=False) is futures[1]
    assert queue.next(()) == B, "it is awaited still"
    assert queue.keys == [A, B, C]
    assert queue.next({B}) == A
    assert queue.next({A, B, C}) is None and queue.future(D) is None


async def test_one_that_nobody_waits_for_gets_its_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    queue = LoadQueue()
    queue.add(A, awaited=False)
    queue.add(B, awaited=True)
    assert queue.next(()) == B
    monkeypatch.setattr(load_queue, "AHEAD_WAITS_S", 0.0)
    assert queue.next(()) == A
    assert queue.waited_s(A) >= queue.waited_s(B) >= 0.0


async def test_all_that_is_left_fails_or_is_cancelled() -> None:
    queue = LoadQueue()
    failed = queue.add(A, awaited=True)
    queue.fail(ShardUnavailable("shard-0"))
    assert isinstance(failed.exception(), ShardUnavailable) and queue.keys == []
    cancelled = queue.add(B, awaited=True)
    queue.cancel()
    assert cancelled.cancelled()
