"""Feedback and comparison on the wire: what workers tell of requests becomes a judgement."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from gateway.control import ControlPlane
from gateway.messages import Ended, Flush, Question, Unasked
from lora_gateway.v1 import adapters_pb2 as pb
from tests.gateway.control_plane import Plane, control_plane
from tests.gateway.outcomes import failure, outcome
from tests.gateway.promises import refused
from tests.gateway.scripted_worker import ScriptedWorker, serving_fleet


@contextlib.asynccontextmanager
async def judged(
    folder: Path, monkeypatch: pytest.MonkeyPatch, unsent: list[Any]
) -> AsyncIterator[Plane]:
    """A control plane with READY versions 1 and 2 of `sql`, and a worker.

    The worker sends the outcomes in `unsent` when it is asked to flush.
    """
    controls: list[ControlPlane] = []

    def hear(message: Unasked) -> None:
        controls[0].hear(message)

    def script(worker: ScriptedWorker, question: Question) -> Any:
        if isinstance(question, Flush):
            worker.host.send(Ended(tuple(unsent)))
            unsent.clear()
        return {}

    async with (
        serving_fleet(monkeypatch, 1, script, hear=hear) as (fleet, _),
        control_plane(folder, monkeypatch, fleet=fleet) as plane,
    ):
        controls.append(plane.control)
        for _ in range(2):
            await plane.ready()
        yield plane


def ended(version: int, request_id: str = "", **fields: Any) -> Any:
    """A request on a version of `sql` that ended now."""
    make = failure if fields.get("code") not in (None, "OK") else outcome
    named = {"adapter": "sql", "version": version, "request_id": request_id, "end_s": time.time()}
    return make(**named | fields)


def score(request_id: str, value: float | None = 1.0) -> pb.RecordFeedbackRequest:
    return pb.RecordFeedbackRequest(request_id=request_id, score=value)


async def compared(plane: Plane, *versions: int, **fields: Any) -> pb.CompareVersionsResponse:
    request = pb.CompareVersionsRequest(adapter="sql", versions=versions, **fields)
    answer: pb.CompareVersionsResponse = await plane.stub.CompareVersions(request)
    return answer


# --- feedback ----------------------------------------------------------------


async def test_a_request_that_ended_just_now_can_be_scored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its outcome may still lie in its worker."""
    unsent = [ended(2, "just-now")]
    async with judged(tmp_path, monkeypatch, unsent) as plane:
        told = await plane.stub.RecordFeedback(score("just-now"))
        assert (told.adapter, told.version) == ("sql", 2)
        assert not unsent
        refusal = await refused(plane.stub.RecordFeedback(score("never")))
        assert refusal.reason == "REQUEST_NOT_FOUND"
        assert refusal.metadata == {"request_id": "never"}


async def test_a_second_score_replaces_the_first_and_survives_a_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with judged(tmp_path, monkeypatch, [ended(1, "a"), ended(1, "b")]) as plane:
        for request_id, value in (("a", 0.0), ("a", 1.0), ("b", 0.5)):
            await plane.stub.RecordFeedback(score(request_id, value))
        (arm,) = (await compared(plane, 1)).arms
        assert (arm.feedback.count, arm.feedback.mean) == (2, 0.75)
    async with control_plane(tmp_path, monkeypatch) as plane:
        (arm,) = (await compared(plane, 1)).arms
        assert (arm.request_count, arm.feedback.count) == (0, 2), "requests are memory alone"
        refusal = await refused(plane.stub.RecordFeedback(score("a")))
        assert refusal.reason == "REQUEST_NOT_FOUND"


@pytest.mark.parametrize("value", [None, math.nan, math.inf])
async def test_a_score_is_a_finite_number(
    value: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with judged(tmp_path, monkeypatch, [ended(1, "a")]) as plane:
        refusal = await refused(plane.stub.RecordFeedback(score("", value)))
        assert (refusal.reason, refusal.fields) == ("INVALID_FIELD", ["request_id", "score"])
        assert (await plane.stub.RecordFeedback(score("a", -1e9))).version == 1


async def test_a_hostile_request_id_is_told_back_in_bounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with judged(tmp_path, monkeypatch, []) as plane:
        refusal = await refused(plane.stub.RecordFeedback(score("\U0001f3f4" * 100_000)))
        assert refusal.reason == "REQUEST_NOT_FOUND"


# --- comparison --------------------------------------------------------------


async def test_arms_are_compared_by_what_their_requests_did(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unsent: list[Any] = []
    async with judged(tmp_path, monkeypatch, unsent) as plane:
        for number in range(100):
            unsent.append(ended(1, f"a{number}", ttft_s=0.05 + number / 1e4))
        for number in range(80):
            unsent.append(ended(2, f"b{number}", ttft_s=0.15 + number / 1e4))
        unsent += [ended(2, f"c{number}", code="INTERNAL") for number in range(20)]
        answer = await compared(plane, 1, 2)
    first, second = answer.arms
    assert (first.version, first.request_count, dict(first.codes)) == (1, 100, {"OK": 100})
    assert (second.version, dict(second.codes)) == (2, {"OK": 80, "INTERNAL": 20})
    assert dict(first.finish_reasons) == {"stop": 100}
    assert (first.prompt_tokens_total, first.completion_tokens_total) == (1000, 800)
    assert first.ttft_ms.count == 100
    assert first.ttft_ms.p50 == pytest.approx(55, abs=1)
    assert first.total_ms.mean == pytest.approx(400)
    differences = {d.measure: d for d in answer.differences}
    assert {d.version for d in answer.differences} == {2}
    errors = differences["error_ratio"]
    assert errors.difference == pytest.approx(0.2)
    assert errors.low > 0 and errors.significant and errors.high < 0.5
    assert differences["ttft_ms.p50"].difference == pytest.approx(99, abs=3)
    assert not differences["total_ms.p50"].significant


async def test_without_versions_all_that_answered_are_compared_and_most_traffic_comes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with judged(tmp_path, monkeypatch, [ended(2, "x")]) as plane:
        assert [arm.version for arm in (await compared(plane)).arms] == [1, 2]
        splits = [pb.TrafficSplit(version=v, weight=w) for v, w in ((1, 10), (2, 90))]
        await plane.stub.SetTraffic(pb.SetTrafficRequest(adapter="sql", splits=splits))
        assert [arm.version for arm in (await compared(plane)).arms] == [2, 1]


async def test_only_requests_since_the_split_changed_count_unless_a_window_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unsent: list[Any] = []
    async with judged(tmp_path, monkeypatch, unsent) as plane:
        unsent.append(ended(1, "before"))
        assert (await compared(plane, 1)).arms[0].request_count == 1
        request = pb.PromoteVersionRequest(adapter="sql", version=1)
        changed = (await plane.stub.PromoteVersion(request)).adapter
        answer = await compared(plane, 1)
        assert answer.arms[0].request_count == 0
        apart_us = answer.since.ToMicroseconds() - changed.traffic_time.ToMicroseconds()
        assert abs(apart_us) <= 1
        wide = await compared(plane, 1, window_s=3600)
        assert wide.arms[0].request_count == 1
        assert wide.since.ToSeconds() <= changed.traffic_time.ToSeconds(), "no later than asked"
        assert time.time() - wide.since.ToSeconds() < 60, "no earlier than the gateway's start"


async def test_an_adapter_without_traffic_and_requests_has_nothing_to_compare(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with control_plane(tmp_path, monkeypatch) as plane:
        await plane.ready(no_traffic=True)
        answer = await compared(plane)
        assert not answer.arms and not answer.differences


async def test_what_cannot_be_compared_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with judged(tmp_path, monkeypatch, []) as plane:
        bad = pb.CompareVersionsRequest(versions=[1, 1], confidence=1.0)
        refusal = await refused(plane.stub.CompareVersions(bad))
        assert refusal.reason == "INVALID_FIELD"
        assert refusal.fields == ["adapter", "versions", "confidence"]
        for confidence in (0.0, math.nan, -1.0):
            assert (await refused(compared(plane, 1, confidence=confidence))).fields == [
                "confidence"
            ]
        assert (await refused(compared(plane, *range(1, 18)))).fields == ["versions"]
        assert (await refused(compared(plane, 1, 9))).reason == "VERSION_NOT_FOUND"
        unknown = pb.CompareVersionsRequest(adapter="nosuch")
        assert (await refused(plane.stub.CompareVersions(unknown))).reason == "ADAPTER_NOT_FOUND"
