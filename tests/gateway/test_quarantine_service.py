"""Quarantine on the wire: listed, and lifted in all processes."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from engine.core_death import CoreDeath
from engine.fingerprint import Tagged
from engine.step_record import Steps
from gateway.messages import Acquitted, FollowQuarantine, Question
from lora_gateway.v1 import admin_pb2 as pb
from tests.gateway.control_plane import TIMEOUT_S, Plane, control_plane
from tests.gateway.promises import refused
from tests.gateway.scripted_worker import ScriptedWorker, serving_fleet
from tests.gateway.three_shards import stub_of

POISON = 0xFEDCBA9876543210
VERSION = {"tenant": "default", "adapter": "sql", "version": 3}


@pytest.fixture
def asked() -> list[Question]:
    """What two workers were asked."""
    return []


@pytest_asyncio.fixture
async def plane(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: list[Question]
) -> AsyncIterator[Plane]:
    """With a request and a version in quarantine, and a suspect."""

    def answer(worker: ScriptedWorker, question: Question) -> None:
        asked.append(question)

    async with (
        serving_fleet(monkeypatch, 2, answer) as (fleet, _),
        control_plane(tmp_path, monkeypatch, fleet=fleet) as plane,
    ):
        crash(plane, POISON)
        crash(plane, POISON)
        crash(plane, 1, "default/sql@3")
        crash(plane, 2, "default/sql@3")
        crash(plane, 3)
        yield plane


def crash(plane: Plane, fingerprint: int, version: str = "") -> None:
    steps = Steps(fresh=frozenset({Tagged("r", fingerprint)}), versions=frozenset({version}))
    plane.control.crashes.judge("shard-0", CoreDeath("killed by SIGSEGV", True, steps))


async def listed(plane: Plane) -> pb.ListQuarantineResponse:
    told: pb.ListQuarantineResponse
    told = await stub_of(plane).ListQuarantine(pb.ListQuarantineRequest(), timeout=TIMEOUT_S)
    return told


async def lift(plane: Plane, **subject: Any) -> bool:
    request = pb.LiftQuarantineRequest(**subject)
    return bool((await stub_of(plane).LiftQuarantine(request, timeout=TIMEOUT_S)).lifted)


async def test_all_that_is_refused_is_listed_with_its_time(plane: Plane) -> None:
    told = await listed(plane)
    assert [request.fingerprint for request in told.requests] == ["fedcba9876543210"]
    (version,) = told.versions
    assert (version.tenant, version.adapter, version.version) == tuple(VERSION.values())
    held = plane.control.crashes.state
    assert told.requests[0].until_time.seconds == int(held.requests[POISON])
    assert version.until_time.seconds == int(held.versions["default/sql@3"])
    assert told.suspect_count == 1


async def test_what_is_lifted_is_lifted_in_all_processes_before_the_answer(
    plane: Plane, asked: list[Question]
) -> None:
    assert await lift(plane, fingerprint="fedcba9876543210")
    assert asked == [FollowQuarantine(plane.control.crashes.state)] * 2
    assert not (await listed(plane)).requests and (await listed(plane)).versions
    plane.control.crashes.screening.check(POISON, None)
    assert await lift(plane, version=VERSION)
    assert len(asked) == 4
    assert not (await listed(plane)).versions


async def test_a_suspect_that_a_worker_saw_answered_is_none_any_more(plane: Plane) -> None:
    plane.control.hear(Acquitted(3))
    assert (await listed(plane)).suspect_count == 0


async def test_a_tenant_may_be_left_out(plane: Plane) -> None:
    assert await lift(plane, version={"adapter": "sql", "version": 3})


async def test_what_is_not_in_quarantine_is_not_lifted(plane: Plane, asked: list[Question]) -> None:
    assert not await lift(plane, fingerprint="0" * 16)
    assert not await lift(plane, version=VERSION | {"version": 4})
    assert not await lift(plane, version=VERSION | {"tenant": "acme"})
    assert not asked


@pytest.mark.parametrize(
    ("subject", "fields"),
    [
        ({}, {"subject"}),
        ({"fingerprint": "7"}, {"fingerprint"}),
        ({"fingerprint": "FEDCBA9876543210"}, {"fingerprint"}),
        ({"version": {"adapter": "no name"}}, {"version.adapter", "version.version"}),
    ],
)
async def test_a_subject_that_is_none_is_refused(
    plane: Plane, subject: Any, fields: set[str]
) -> None:
    refusal = await refused(stub_of(plane).LiftQuarantine(pb.LiftQuarantineRequest(**subject)))
    assert set(refusal.fields) == fields
