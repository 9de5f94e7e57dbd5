"""What one process refuses, and of whom it tells the host."""

from __future__ import annotations

import pytest

from engine.errors import AdapterQuarantined, PoisonRequest
from engine.generation import ServedVersion
from engine.quarantine import Quarantined
from engine.screening import Screening

NOW_S = 1_800_000_000.0
VERSION = ServedVersion("acme", "alpha", 3, 1, "/alpha", "digest")
OTHER = ServedVersion("acme", "alpha", 4, 2, "/alpha", "digest")
HELD = Quarantined({7: NOW_S + 60}, {"acme/alpha@3": NOW_S + 90})


def test_while_nobody_is_in_quarantine_everybody_passes() -> None:
    screening = Screening(clock=lambda: pytest.fail("it costs nothing"))
    screening.check(7, VERSION)
    screening.follow(Quarantined(suspects=frozenset({7})))
    screening.check(7, None)


def test_a_request_is_refused_until_its_time() -> None:
    now_s = [NOW_S]
    screening = Screening(clock=lambda: now_s[0])
    screening.follow(HELD)
    screening.check(8, OTHER)
    screening.check(8, None)
    with pytest.raises(
        PoisonRequest, match=r"an engine crashed twice .* until 2027-01-15T08:01:00Z"
    ):
        screening.check(7, None)
    now_s[0] += 60
    screening.check(7, None)


def test_a_version_is_refused_and_no_other() -> None:
    now_s = [NOW_S]
    screening = Screening(clock=lambda: now_s[0])
    screening.follow(HELD)
    with pytest.raises(AdapterQuarantined, match="version 3 of adapter 'alpha'") as caught:
        screening.check(8, VERSION)
    assert caught.value.left_s == 90
    screening.check(8, OTHER)
    now_s[0] += 90
    screening.check(8, VERSION)


def test_what_is_lifted_passes_at_once() -> None:
    screening = Screening(clock=lambda: NOW_S)
    screening.follow(HELD)
    screening.follow(Quarantined())
    screening.check(7, VERSION)


def test_a_suspect_that_ends_well_is_told_once() -> None:
    told: list[int] = []
    screening = Screening(told.append)
    screening.finished(7)
    screening.follow(Quarantined(suspects=frozenset({7})))
    for fingerprint in (8, 7, 7):
        screening.finished(fingerprint)
    assert told == [7]
