"""The one encoding of a status."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest

from gateway.status import Phase, encode
from tests.gateway.statuses import JOB, SHARD, status


def decoded(**fields: Any) -> Any:
    content = encode(status(**fields))
    assert b"\n" not in content and b"\r" not in content, "it is one line of an event"
    return json.loads(content)


def test_every_part_is_told() -> None:
    told = decoded()
    assert (told["phase"], told["workers"]) == ("serving", {"serving": 2})
    assert told["shards"][0]["residents"][0]["adapter"] == "sql"
    assert told["adapters"][0]["arms"][0]["share"] == 0.9
    assert told["jobs"][0]["curve"] == [[1, 3.0], [2, 2.5]]
    assert told["events"][0]["text"] == "is ready"


@pytest.mark.parametrize("phase", Phase)
def test_a_phase_is_told_by_its_name(phase: Phase) -> None:
    assert decoded(phase=phase)["phase"] == phase.value


@pytest.mark.parametrize(
    "name",
    [
        "</script><script>alert(1)</script>",
        "two\r\nlines\n\ndata: forged",
        "\u2028\u0000\x1b[31m",
        "ünïcödé 🏴‍☠️",
        '"quoted" & \\back',
    ],
)
def test_odd_texts_come_through_as_they_are(name: str) -> None:
    told = decoded(shards=(replace(SHARD, reason=name),), jobs=(replace(JOB, message=name),))
    assert told["shards"][0]["reason"] == told["jobs"][0]["message"] == name


def test_what_is_no_finite_number_is_null() -> None:
    """JSON has no NaN, and a browser refuses all of it for one."""
    told = decoded(jobs=(replace(JOB, loss=math.nan, eval_loss=math.inf, curve=((1, math.nan),)),))
    assert (told["jobs"][0]["loss"], told["jobs"][0]["eval_loss"]) == (None, None)
    assert told["jobs"][0]["curve"] == [[1, None]]
