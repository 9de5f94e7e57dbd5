"""SIGKILL of the host at every point of publishing: one version comes of it, and one end."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.gateway.publishing_host import PERCENT, Outcome

ROOT = Path(__file__).parents[2]
FEWEST_POINTS = 20
"""Publishing writes ten times to what lasts, and may die before and after each."""


def _shares(outcome: Outcome) -> dict[int, int]:
    """In percent."""
    total = sum(outcome.traffic.values())
    return {version: 100 * weight // total for version, weight in outcome.traffic.items()}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_host_that_is_killed_while_it_publishes_has_published_once(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.gateway.publishing_host", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    outcomes = [Outcome.model_validate_json(line) for line in done.stdout.splitlines()]
    assert len(outcomes) >= FEWEST_POINTS
    for outcome in outcomes:
        assert outcome.killed, outcome
        assert outcome.versions == {1: "READY", 2: "READY"}, outcome
        assert _shares(outcome) == {1: 100 - PERCENT, 2: PERCENT}, outcome
        assert (outcome.job, outcome.ends) == ("SUCCEEDED", ["succeeded"]), outcome
        assert outcome.served == 1 and outcome.sequences_whole, outcome
        assert outcome.stored == 2 and outcome.left_over == [], outcome
    print(f"{len(outcomes)} kill points:")
    for outcome in outcomes:
        print(f"  {outcome.point}")
