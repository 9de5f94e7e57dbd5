"""What the host makes of deaths: judged, logged, shown and told on."""

from __future__ import annotations

import logging

import pytest

from engine.core_death import CoreDeath
from engine.errors import PoisonRequest
from engine.fingerprint import Tagged
from engine.generation import VersionKey
from engine.quarantine import Kind
from engine.step_record import Steps
from gateway import metrics
from gateway.crashes import MAX_NAMED, Crashes

SHARD = "shard-1"
A = VersionKey("acme", "alpha", 3)


def crash(*numbers: int, version: str = "") -> CoreDeath:
    requests = frozenset(Tagged(f"r{number}", number) for number in numbers)
    return CoreDeath(
        "killed by SIGSEGV", True, Steps(fresh=requests, versions=frozenset({version}))
    )


def shown(crashes: Crashes) -> dict[str, float]:
    (gauge,) = crashes.collect()
    assert gauge.name == "gateway_poison_quarantined"
    return {sample.labels["kind"]: sample.value for sample in gauge.samples}


def suspects() -> float:
    return float(metrics.crash_suspects.labels(SHARD)._value.get())


def test_a_request_in_two_crashes_is_refused_by_the_host_too_and_told_to_all(
    caplog: pytest.LogCaptureFixture,
) -> None:
    crashes, before = Crashes(), suspects()
    with caplog.at_level(logging.WARNING):
        told = crashes.judge(SHARD, crash(7, *range(100, 120)))
    assert told.suspects == crashes.state.suspects and not told.requests
    named = ", ".join(f"r{number}" for number in range(100, 100 + MAX_NAMED))
    assert f"{SHARD} crashed while it computed {named} and {21 - MAX_NAMED} more" in caplog.text
    crashes.screening.check(7, None)
    with caplog.at_level(logging.ERROR):
        assert crashes.judge(SHARD, crash(7)).requests.keys() == {7}
    assert "request 0000000000000007 was there in two crashes: quarantined" in caplog.text
    with pytest.raises(PoisonRequest):
        crashes.screening.check(7, None)
    assert suspects() == before + 22
    assert shown(crashes) == {"request": 1, "adapter_version": 0}


def test_a_death_that_is_no_crash_is_not_judged() -> None:
    crashes, before = Crashes(), suspects()
    killed = CoreDeath("killed by SIGKILL", False, crash(7).steps)
    for _ in range(2):
        assert not crashes.judge(SHARD, killed).suspects
    assert suspects() == before


def test_a_crash_between_two_steps_accuses_nobody() -> None:
    crashes = Crashes()
    for _ in range(2):
        assert not crashes.judge(SHARD, CoreDeath("killed by SIGSEGV", True)).requests


def test_a_version_is_held_by_its_key(caplog: pytest.LogCaptureFixture) -> None:
    crashes = Crashes()
    crashes.judge(SHARD, crash(1, version="acme/alpha@3"))
    assert not crashes.holds(A)
    crashes.judge(SHARD, crash(2, version="acme/alpha@3"))
    assert crashes.holds(A) and not crashes.holds(A._replace(version=4))
    assert "adapter version acme/alpha@3 was there in two crashes" in caplog.text
    assert shown(crashes) == {"request": 0, "adapter_version": 1}


def test_a_suspect_that_the_host_saw_end_well_is_acquitted() -> None:
    crashes = Crashes()
    crashes.judge(SHARD, crash(7, 8))
    crashes.screening.finished(7)
    assert crashes.state.suspects == {8}


def test_what_is_lifted_is_served_at_once() -> None:
    crashes = Crashes()
    for _ in range(2):
        crashes.judge(SHARD, crash(7))
    assert crashes.lift(Kind.REQUEST, 8) is None
    told = crashes.lift(Kind.REQUEST, 7)
    assert told is not None and not told.requests
    crashes.screening.check(7, None)
    assert shown(crashes) == {"request": 0, "adapter_version": 0}
