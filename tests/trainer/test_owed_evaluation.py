"""Whether a run that is asked to end owes an evaluation."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from trainer.checkpoint import CheckpointManifest
from trainer.owed_evaluation import Evaluations

EPOCH_STEPS, STEPS = 4, 10


def at(step: int) -> Any:
    return SimpleNamespace(global_step=step, max_steps=STEPS)


def resumed(step: int, *, owed: bool) -> CheckpointManifest:
    return CheckpointManifest(
        step=step, files={}, size_bytes=1, create_time_ns=1, evaluation_owed=owed
    )


def test_it_is_owed_after_an_epoch_and_at_the_end_until_it_is_done() -> None:
    evaluations: Any = Evaluations(EPOCH_STEPS, None)
    assert [step for step in range(1, STEPS + 1) if evaluations.owed(at(step))] == [4, 8, 10]
    evaluations.on_evaluate(None, at(8), None)
    assert [step for step in range(1, STEPS + 1) if evaluations.owed(at(step))] == [4, 10]


def test_nothing_is_owed_where_nothing_is_held_out() -> None:
    evaluations = Evaluations(None, None)
    assert not any(evaluations.owed(at(step)) for step in range(STEPS + 1))


@pytest.mark.parametrize("owed", [True, False])
def test_who_goes_on_owes_what_the_one_before_did(owed: bool) -> None:
    evaluations = Evaluations(EPOCH_STEPS, resumed(4, owed=owed))
    assert evaluations.owed(at(4)) is owed
    assert evaluations.owed(at(8))
