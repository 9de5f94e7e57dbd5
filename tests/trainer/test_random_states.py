"""A run that is stopped within a step leaves what it draws at random as it was before that step."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
from transformers import TrainerControl, TrainerState

from trainer.checkpointing import Stopper
from trainer.random_states import RandomStates
from trainer.run_folder import RunFolder

NOTHING: Any = None


def drawn() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def test_what_was_drawn_is_drawn_again() -> None:
    states = RandomStates.now()
    first = drawn()
    assert drawn() != first
    states.restore()
    assert drawn() == first


def test_a_stop_within_a_step_takes_back_what_was_drawn_for_it(tmp_path: Path) -> None:
    life = SimpleNamespace(stop_requested=False, save_requested=True, gets_on=lambda: None)
    stopper = Stopper(RunFolder(tmp_path), cast(Any, life))
    state, control = TrainerState(global_step=3), TrainerControl()
    stopper.on_step_end(NOTHING, state, control)
    expected = RandomStates.now()
    drawn()
    stopper.on_substep_end(NOTHING, state, control)
    drawn()
    life.stop_requested = True
    stopper.on_substep_end(NOTHING, state, control)
    assert stopper.stopped and control.should_save
    found = drawn()
    expected.restore()
    assert drawn() == found


def test_a_stop_after_a_step_takes_back_nothing(tmp_path: Path) -> None:
    life = SimpleNamespace(stop_requested=True, save_requested=True, gets_on=lambda: None)
    stopper = Stopper(RunFolder(tmp_path), cast(Any, life))
    before = RandomStates.now()
    first = drawn()
    stopper.on_step_end(NOTHING, TrainerState(global_step=3), TrainerControl())
    second = drawn()
    before.restore()
    assert (drawn(), drawn()) == (first, second)
