"""Who gets a slot, whose is recalled for it, and when: the host's side, on a virtual clock."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from types import SimpleNamespace
from typing import Any

import pytest

from engine import slots as slots_module
from engine.generation import VersionKey
from engine.slots import MIN_TENURE_S, TurnState
from tests.engine.slots_stage import ONE, OTHER, A, B, C, D, E, F, Stage, grown_old, soon
from tests.engine.virtual_time import VirtualTimeLoop


@pytest.fixture
def on_stage(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Runs a play on a virtual clock: `on_stage(capacity, play)`."""

    def run(capacity: int, play: Callable[[Stage], Coroutine[Any, Any, None]]) -> None:
        async def perform() -> None:
            stage = Stage(capacity)
            work = asyncio.create_task(stage.slots.run())
            await play(stage)
            assert not work.done()
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)
            others = asyncio.all_tasks() - {asyncio.current_task()}
            assert not others, "recalls end with it"

        loop = VirtualTimeLoop()
        monkeypatch.setattr(slots_module, "time", SimpleNamespace(monotonic=loop.time))
        with asyncio.Runner(loop_factory=lambda: loop) as runner:
            runner.run(perform())

    return run


OnStage = Callable[[int, Callable[[Stage], Coroutine[Any, Any, None]]], None]


def test_a_free_slot_is_granted_at_once_and_stays(on_stage: OnStage) -> None:
    async def play(at: Stage) -> None:
        at.want(A, B)
        assert at.holders.granted_to == [A, B] == at.slots.granted, "without a task switch"
        await grown_old()
        assert not at.holders.recalled, "nobody else wants one"
        assert not at.slots.are_contended
        assert not at.holders.surveys

    on_stage(2, play)


def test_turns_tell_who_has_a_slot_who_gives_one_back_and_who_waits(on_stage: OnStage) -> None:
    held, returning, waiting = TurnState.HELD, TurnState.RETURNING, TurnState.WAITING

    async def play(at: Stage) -> None:
        def told() -> list[tuple[VersionKey, TurnState]]:
            return [(key, state) for key, state, _ in at.slots.turns]

        begin_s = asyncio.get_running_loop().time()
        at.want(A, B)
        at.become_busy(A, B)
        await asyncio.sleep(1.0)
        at.want(C, D, process=ONE)
        at.want(C, process=OTHER)
        await soon()
        assert told() == [(B, held), (A, returning), (C, waiting), (D, waiting)]
        since_s = [round(turn.since_s - begin_s, 2) for turn in at.slots.turns]
        assert since_s == [0.0, 1.0, 1.0, 1.0]
        await asyncio.sleep(1.0)
        at.become_busy(C)
        await at.give_back(A)
        await asyncio.sleep(1.0)
        assert told() == [(C, held), (B, returning), (D, waiting)]
        assert round(at.slots.turns[0].since_s - begin_s, 1) == 2.0
        at.give_up(D)
        assert told() == [(C, held), (B, returning)]

    on_stage(2, play)


def test_what_was_granted_is_not_wanted_by_a_message_that_crossed_it(on_stage: OnStage) -> None:
    async def play(at: Stage) -> None:
        at.want(A, process=ONE)
        at.want(A, process=OTHER)
        assert at.holders.granted_to == [A], "the other one has been told"
        assert not at.slots.are_contended

    on_stage(1, play)


def test_the_idle_version_that_was_used_last_longest_ago_gives_its_slot(on_stage: OnStage) -> None:
    async def play(at: Stage) -> None:
        at.want(A, B, C)
        at.become_busy(A)
        at.holders.last_use_s = {A: 1.0, B: 3.0, C: 2.0}
        at.want(D)
        await soon()
        assert at.holders.recalled == [C], "it needs not be old"
        assert at.slots.granted == [A, B]
        await at.give_back(C)
        assert at.holders.granted_to == [A, B, C, D]

    on_stage(3, play)


def test_what_is_not_loaded_for_anybody_is_not_idle(on_stage: OnStage) -> None:
    async def play(at: Stage) -> None:
        at.want(A, B)
        at.holders.loaded = {B}  # A leaves the engine, once its requests have ended
        at.want(C)
        await soon()
        assert at.holders.recalled == [B]

    on_stage(2, play)


def test_of_busy_versions_the_one_with_its_slot_for_longest_gives_it_but_not_at_once(
    on_stage: OnStage,
) -> None:
    async def play(at: Stage) -> None:
        at.become_busy(A, B, requests=1)
        at.want(A)
        await asyncio.sleep(MIN_TENURE_S / 2)
        at.want(B, C)
        await asyncio.sleep(MIN_TENURE_S / 4)
        assert not at.holders.recalled
        await asyncio.sleep(MIN_TENURE_S / 2)
        assert at.holders.recalled == [A], "one for one"
        await grown_old()
        assert at.holders.recalled == [A]
        await at.give_back(A)
        assert at.slots.granted == [B, C]

    on_stage(2, play)


def test_no_more_are_recalled_at_once_than_may_empty_a_quarter_of_the_batch(
    on_stage: OnStage,
) -> None:
    async def play(at: Stage) -> None:
        slots = [VersionKey("acme", f"slot-{number}", 1) for number in range(8)]
        at.holders.loaded.update(slots)
        at.become_busy(*slots, A)
        at.want(*slots, A, B, C, D)
        await grown_old()
        assert at.holders.recalled == slots[:2]
        await at.give_back(slots[0])
        assert at.holders.recalled == slots[:3]

    on_stage(8, play)


def test_one_is_recalled_however_much_of_the_batch_it_is_and_none_goes_before_it(
    on_stage: OnStage,
) -> None:
    async def play(at: Stage) -> None:
        at.become_busy(A, C, requests=2)
        at.become_busy(B, requests=50)
        at.become_busy(D, requests=1)
        at.want(A, B, C, D, E, F)
        at.want(VersionKey("acme", "g", 1))
        await grown_old()
        assert at.holders.recalled == [A, D], "of D, one request, nothing is empty before its end"
        at.become_busy(E)
        await at.give_back(A)
        assert at.holders.recalled == [A, D, B], "nor C, whose two are hardly a gap"

    on_stage(4, play)


def test_no_more_are_recalled_than_wait(on_stage: OnStage) -> None:
    async def play(at: Stage) -> None:
        at.become_busy(A, B, C, D, requests=1)
        at.want(A, B, C, D, E)
        await grown_old()
        assert at.holders.recalled == [A]

    on_stage(4, play)


def test_idle_slots_are_recalled_for_all_who_wait(on_stage: OnStage) -> None:
    async def play(at: Stage) -> None:
        at.want(A, B, C, D)
        at.want(E, F)
        await soon()
        assert len(at.holders.recalled) == 2

    on_stage(4, play)


def test_slots_go_to_those_who_wait_in_the_order_of_their_arrival(on_stage: OnStage) -> None:
    async def play(at: Stage) -> None:
        at.become_busy(A)
        at.want(A, B, C)
        at.want(B, process=OTHER)
        await grown_old()
        at.want(A)  # requests that came after it was recalled
        await at.give_back(A)
        assert at.holders.granted_to == [A, B]
        at.become_busy(B)
        await grown_old()
        await at.give_back(B)
        at.become_busy(C)
        await grown_old()
        await at.give_back(C)
        assert at.holders.granted_to == [A, B, C, A]
        assert at.counts[-1] == 0 and max(at.counts) == 3

    on_stage(1, play)


def test_one_that_becomes_idle_gives_its_slot_when_a_process_says_so(on_stage: OnStage) -> None:
    async def play(at: Stage) -> None:
        at.become_busy(A, B)
        at.want(A, B, C)
        await grown_old()
        at.want(D)
        await soon()
        assert at.holders.recalled == [A]
        del at.holders.busy[B]
        at.slots.look()
        await soon()
        assert at.holders.recalled == [A, B]

    on_stage(2, play)


def test_without_that_word_idle_ones_are_looked_for(on_stage: OnStage) -> None:
    async def play(at: Stage) -> None:
        at.become_busy(A, B)
        at.want(A, B, C, D)
        await grown_old()
        del at.holders.busy[B]
        await asyncio.sleep(2 * slots_module.SURVEY_INTERVAL_S)
        assert at.holders.recalled == [A, B]

    on_stage(2, play)


def test_for_who_gave_up_nothing_is_recalled(on_stage: OnStage) -> None:
    async def play(at: Stage) -> None:
        at.become_busy(A)
        at.want(A, B)
        at.want(B, process=OTHER)
        at.give_up(B)
        assert at.slots.are_contended, "others still wait for it"
        at.give_up(B, process=OTHER)
        at.give_up(C)  # it was granted meanwhile, or the process began anew
        assert not at.slots.are_contended and at.counts[-1] == 0
        await grown_old()
        assert not at.holders.recalled

    on_stage(1, play)


def test_a_process_that_died_waits_for_nothing(on_stage: OnStage) -> None:
    async def play(at: Stage) -> None:
        at.become_busy(A)
        at.want(A, B, C)
        at.want(C, process=OTHER)
        at.slots.forget(ONE)
        await grown_old()
        await at.give_back(A)
        assert at.holders.granted_to == [A, C]

    on_stage(1, play)


def test_a_slot_that_was_recalled_for_who_gave_up_is_free(on_stage: OnStage) -> None:
    async def play(at: Stage) -> None:
        at.become_busy(A)
        at.want(A, B)
        await grown_old()
        at.give_up(B)
        await at.give_back(A)
        assert at.slots.granted == []
        at.want(C)
        assert at.slots.granted == [C]

    on_stage(1, play)


def test_a_version_keeps_a_slot_that_nobody_else_needs_any_more(on_stage: OnStage) -> None:
    async def play(at: Stage) -> None:
        at.become_busy(A)
        at.want(A, B)
        await grown_old()
        first = at.holders.returned[A]
        at.want(A)
        assert at.holders.granted_to == [A], "B is first"
        at.give_up(B)
        assert at.holders.granted_to == [A, A], "it runs on, though its last streams have not ended"
        first.set()
        await soon()
        assert at.slots.granted == [A]
        at.want(C)
        await grown_old()
        assert at.holders.recalled == [A, A]
        first.set()  # the first recall, answered long ago
        await soon()
        assert at.slots.granted == [] and at.holders.granted_to == [A, A]
        await at.give_back(A)
        assert at.slots.granted == [C]

    on_stage(1, play)


def test_an_old_recall_frees_no_slot_that_is_recalled_anew(on_stage: OnStage) -> None:
    async def play(at: Stage) -> None:
        at.become_busy(A)
        at.want(A, B)
        await grown_old()
        first = at.holders.returned[A]
        at.want(A)
        at.give_up(B)
        at.want(C)
        await grown_old()
        assert at.holders.recalled == [A, A]
        first.set()  # a worker that was slow to answer
        await soon()
        assert at.slots.granted == [], "requests of A run still"
        await at.give_back(A)
        assert at.slots.granted == [C]

    on_stage(1, play)


def test_a_version_that_left_the_engine_gives_its_slot(on_stage: OnStage) -> None:
    async def play(at: Stage) -> None:
        at.become_busy(A)
        at.want(A, B)
        at.slots.left(A)
        assert at.holders.withdrawn_from == [A]
        assert at.slots.granted == [B]
        at.slots.left(C)
        assert at.holders.withdrawn_from == [A], "it had none"

    on_stage(1, play)


def test_who_may_enter_is_told(on_stage: Callable[..., None]) -> None:
    async def play(at: Stage) -> None:
        assert at.slots.may_enter(A, ())
        at.want(A, B)
        assert at.slots.may_enter(A, {A, B}), "it has its slot"
        assert at.slots.may_enter(C, {A}), "B has its slot, and can do without"
        assert not at.slots.may_enter(C, {A, B})
        at.become_busy(A, B)
        at.want(C)
        assert not at.slots.may_enter(D, ()), "another one waits"
        await grown_old()
        (recalled,) = at.holders.recalled
        assert not at.slots.may_enter(recalled, {A, B}), "its slot is on the way to another"
        await at.give_back(recalled)
        assert at.slots.may_enter(C, {A, B, C})

    on_stage(2, play)
