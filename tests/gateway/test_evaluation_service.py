"""EvaluateVersion on the wire: progress, results, one summary; live traffic comes first."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from engine import evaluation
from engine.errors import GenerationFailed, ShardUnavailable
from engine.generation import Load, VersionKey
from lora_gateway.v1 import adapters_pb2 as pb
from lora_gateway.v1 import inference_pb2
from tests.gateway.control_plane import TENANT, TIMEOUT_S, Plane, control_plane, named
from tests.gateway.promises import refused

EXACT, CONTAINS = pb.SCORER_EXACT_MATCH, pb.SCORER_CONTAINS
JSON, LIKELIHOOD = pb.SCORER_VALID_JSON, pb.SCORER_LOG_LIKELIHOOD
ANSWER = "0 1 2 "
"""What the shard says to everything, in three tokens."""


@pytest_asyncio.fixture
async def plane(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Plane]:
    """With READY versions 1 and 2 of `sql`."""
    async with control_plane(tmp_path, monkeypatch, max_num_seqs=8) as plane:
        for _ in range(2):
            await plane.ready()
        yield plane


def request(*examples: pb.EvaluationExample, **fields: Any) -> pb.EvaluateVersionRequest:
    """An evaluation of version 1, but for `fields`."""
    known: dict[str, Any] = {"adapter": "sql", "versions": [1], "max_tokens": 3, **fields}
    return pb.EvaluateVersionRequest(examples=examples, **known)


def example(text: str = "one two", **fields: Any) -> pb.EvaluationExample:
    return pb.EvaluationExample(text=text, **fields)


async def evaluate(plane: Plane, asked: pb.EvaluateVersionRequest) -> list[Any]:
    """All messages: their one field each."""
    call = plane.stub.EvaluateVersion(asked, timeout=TIMEOUT_S)
    return [getattr(message, message.WhichOneof("event")) async for message in call]


def write_dataset(plane: Plane, *lines: dict[str, Any]) -> str:
    path = plane.sources / "held-out.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    return str(path)


# --- what comes out ----------------------------------------------------------


async def test_progress_after_each_answer_and_one_summary_at_the_end(plane: Plane) -> None:
    examples = [example(expected=ANSWER), example(expected="other"), example(expected="0 1")]
    told = await evaluate(plane, request(*examples, versions=[1, 2], scorers=[EXACT, CONTAINS]))
    *progress, summary = told
    assert [(p.done, p.total) for p in progress] == [(done, 6) for done in range(1, 7)]
    means = {(s.version, s.scorer): (s.mean, s.count) for s in summary.scores}
    assert means == {
        (1, EXACT): (pytest.approx(1 / 3), 3),
        (1, CONTAINS): (pytest.approx(2 / 3), 3),
        (2, EXACT): (pytest.approx(1 / 3), 3),
        (2, CONTAINS): (pytest.approx(2 / 3), 3),
    }
    assert all(s.low <= s.mean <= s.high for s in summary.scores)
    assert {(d.version, d.difference, d.significant) for d in summary.differences} == {
        (2, 0.0, False)
    }
    assert summary.failed_count == 0


async def test_results_come_with_answers_and_scores_where_asked_for(plane: Plane) -> None:
    chat = inference_pb2.Chat(messages=[inference_pb2.ChatMessage(role="user", content="a b")])
    asked = request(
        example(expected=ANSWER),
        pb.EvaluationExample(chat=chat, contains=["1", "2"]),
        versions=[1, 0],
        return_results=True,
        scorers=[EXACT, CONTAINS, JSON],
    )
    results = [m for m in await evaluate(plane, asked) if isinstance(m, pb.EvaluationResult)]
    assert {(r.example, r.version): r.answer for r in results} == {
        place: ANSWER for place in ((0, 1), (0, 0), (1, 1), (1, 0))
    }
    scores = {r.example: {s.scorer: s.value for s in r.scores} for r in results}
    assert scores == {0: {EXACT: 1, CONTAINS: 1, JSON: 0}, 1: {CONTAINS: 1, JSON: 0}}


async def test_each_version_answers_for_itself(plane: Plane) -> None:
    """The fake shard scores tokens by the version that is named to it."""
    asked = request(example(expected="x y"), versions=[0, 1, 2], scorers=[LIKELIHOOD])
    summary = (await evaluate(plane, asked))[-1]
    assert {s.version: s.mean for s in summary.scores} == {0: -1, 1: -2, 2: -3}
    assert {d.version: d.difference for d in summary.differences} == {1: -1, 2: -2}


async def test_without_scorers_all_that_have_what_they_need_apply(plane: Plane) -> None:
    summary = (await evaluate(plane, request(example(expected=ANSWER), example())))[-1]
    assert {s.scorer: s.count for s in summary.scores} == {
        EXACT: 1,
        CONTAINS: 1,
        JSON: 2,
        LIKELIHOOD: 1,
    }


async def test_an_example_that_fails_is_told_and_the_others_count(
    plane: Plane, monkeypatch: pytest.MonkeyPatch
) -> None:
    render = plane.shard.render

    async def refuse_bombs(prompt: Any) -> Any:
        if prompt == "bomb":
            raise GenerationFailed("too hard")
        return await render(prompt)

    monkeypatch.setattr(plane.shard, "render", refuse_bombs)
    asked = request(
        example("bomb", expected="x"),
        example(expected=ANSWER),
        return_results=True,
        scorers=[EXACT],
    )
    told = await evaluate(plane, asked)
    errors = {m.example: m.error for m in told if isinstance(m, pb.EvaluationResult)}
    assert errors == {0: "too hard", 1: ""}
    assert (told[-1].failed_count, told[-1].scores[0].count) == (1, 1)


async def test_a_dataset_is_read_where_the_gateway_may_read(plane: Plane) -> None:
    uri = write_dataset(
        plane,
        {"text": "one", "expected": ANSWER},
        {"chat": {"messages": [{"role": "user", "content": "hi"}]}, "contains": ["9"]},
    )
    summary = (await evaluate(plane, request(dataset_uri=uri, scorers=[CONTAINS])))[-1]
    assert (summary.scores[0].mean, summary.scores[0].count) == (0.5, 2)


async def test_a_version_that_is_not_loaded_is_loaded_for_it(plane: Plane) -> None:
    await plane.stub.UnloadAdapterVersion(named(pb.UnloadAdapterVersionRequest))
    await evaluate(plane, request(example(expected=ANSWER), scorers=[EXACT]))
    assert VersionKey(TENANT, "sql", 1) in plane.shard.loaded


# --- live traffic comes first ------------------------------------------------


@pytest.mark.parametrize("load", [Load(4, 0, 0, 0.1), Load(0, 1, 0, 0.1), Load(100, 100, 0, 1.0)])
async def test_nothing_is_generated_while_live_requests_need_the_engine(
    load: Load, plane: Plane, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "POLL_INTERVAL_S", 0.01)
    plane.shard.load_now = load
    asked = request(example(expected=ANSWER), scorers=[EXACT])
    evaluating = asyncio.ensure_future(evaluate(plane, asked))
    assert not (await asyncio.wait([evaluating], timeout=0.2))[0]
    assert not plane.shard.running
    plane.shard.load_now = Load(3, 0, 0, 0.1)
    assert (await evaluating)[-1].scores[0].mean == 1


async def test_a_caller_who_leaves_ends_all_of_it(plane: Plane) -> None:
    asked = request(*[example(expected="x")] * 100, max_tokens=4096, scorers=[EXACT])
    call = plane.stub.EvaluateVersion(asked)
    async with asyncio.timeout(TIMEOUT_S):
        while not plane.shard.running:
            await asyncio.sleep(0.01)
        call.cancel()
        while plane.shard.running:
            await asyncio.sleep(0.01)
    # The version is held no more: it can be taken out.
    request_out = named(pb.UnloadAdapterVersionRequest)
    answer = await plane.stub.UnloadAdapterVersion(request_out, timeout=TIMEOUT_S)
    assert not answer.adapter_version.residency


# --- what is refused ---------------------------------------------------------


async def test_everything_that_is_wrong_is_told_at_once(plane: Plane) -> None:
    unknown: list[Any] = [0, 99]
    bad = pb.EvaluateVersionRequest(
        adapter="Not A Name", examples=[example()], dataset_uri="/x", scorers=unknown
    )
    refusal = await refused(evaluate(plane, bad))
    assert refusal.reason == "INVALID_FIELD"
    assert refusal.fields == ["adapter", "dataset_uri", "scorers"]
    bad = request(
        example(""),
        example(contains=[""]),
        versions=[1, 1],
        max_tokens=5000,
        max_concurrency=65,
        scorers=[LIKELIHOOD],
    )
    assert (await refused(evaluate(plane, bad))).fields == [
        *("versions", "scorers", "max_tokens", "max_concurrency"),
        *("examples[0].text", "examples[1].contains[0]"),
    ]


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"versions": []}, "versions"),
        ({"versions": list(range(9))}, "versions"),
        ({"examples": []}, "examples"),
        ({"examples": [pb.EvaluationExample(expected="x")]}, "examples[0].prompt"),
    ],
)
async def test_limits_of_an_evaluation(fields: dict[str, Any], field: str, plane: Plane) -> None:
    for _ in range(7):
        await plane.ready()
    known: dict[str, Any] = {"adapter": "sql", "versions": [1], "examples": [example()]}
    refusal = await refused(evaluate(plane, pb.EvaluateVersionRequest(**known | fields)))
    assert (refusal.reason, refusal.fields[0]) == ("INVALID_FIELD", field)


async def test_versions_must_be_there_and_ready(plane: Plane) -> None:
    assert (await refused(evaluate(plane, request(example(), versions=[1, 9])))).reason == (
        "VERSION_NOT_FOUND"
    )
    unknown = request(example(), adapter="nosuch")
    assert (await refused(evaluate(plane, unknown))).reason == "ADAPTER_NOT_FOUND"
    await plane.stub.DeleteAdapterVersion(named(pb.DeleteAdapterVersionRequest, version=2))
    refusal = await refused(evaluate(plane, request(example(), versions=[0, 2])))
    assert refusal.reason == "ADAPTER_NOT_READY"
    assert refusal.metadata == {"adapter": "sql", "version": "2", "state": "DELETED"}


@pytest.mark.parametrize(
    ("uri", "reason", "field"),
    [
        ("/etc/passwd", "SOURCE_NOT_ALLOWED", ""),
        ("{sources}/nosuch.jsonl", "INVALID_FIELD", "dataset_uri"),
        ("held-out.jsonl", "INVALID_FIELD", "dataset_uri"),
        ("{sources}/../x.jsonl", "INVALID_FIELD", "dataset_uri"),
        ("{sources}/bad.jsonl", "INVALID_FIELD", "dataset_uri:2"),
    ],
)
async def test_a_dataset_that_cannot_be_had_is_refused(
    uri: str, reason: str, field: str, plane: Plane
) -> None:
    (plane.sources / "bad.jsonl").write_text('{"text": "one"}\n{"text": 1}\n')
    asked = request(dataset_uri=uri.format(sources=plane.sources))
    refusal = await refused(evaluate(plane, asked))
    assert refusal.reason == reason
    if field:
        assert refusal.fields == [field]


async def test_a_version_that_cannot_be_loaded_ends_it(plane: Plane) -> None:
    await plane.stub.UnloadAdapterVersion(named(pb.UnloadAdapterVersionRequest))
    plane.shard.refuses[VersionKey(TENANT, "sql", 1)] = GenerationFailed("out of memory")
    asked = request(example(expected="x"), scorers=[EXACT])
    assert (await refused(evaluate(plane, asked))).reason == "ADAPTER_LOAD_FAILED"


async def test_an_engine_that_dies_ends_it(plane: Plane, monkeypatch: pytest.MonkeyPatch) -> None:
    async def dead() -> Load:
        raise ShardUnavailable("shard-0")

    monkeypatch.setattr(plane.shard, "core_load", dead)
    asked = request(example(expected="x"), scorers=[EXACT])
    refusal = await refused(evaluate(plane, asked))
    assert refusal.reason == "SHARD_UNAVAILABLE"
    assert refusal.metadata["shard"] == "shard-0"
