"""`gateway adapters compare`, `evaluate` and `feedback`: how versions do."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from lora_gateway.v1 import adapters_pb2 as pb
from lora_gateway.v1.inference_pb2 import Chat, ChatMessage
from tests.client.fake_adapters import FakeAdapters, served
from tests.gateway.adapters_command import answered, run

EXAMPLES = [
    pb.EvaluationExample(text="ahoy", expected="matey", contains=["m", "y"]),
    pb.EvaluationExample(chat=Chat(messages=[ChatMessage(role="user", content="hi")])),
]


@pytest.fixture
def adapters() -> FakeAdapters:
    fake = FakeAdapters()
    fake.summary = pb.EvaluationSummary(
        scores=[
            pb.VersionScore(
                version=0, scorer=pb.SCORER_CONTAINS, mean=0.25, low=0, high=0.5, count=2
            ),
            pb.VersionScore(version=2, scorer=pb.SCORER_CONTAINS, mean=1, low=1, high=1, count=2),
        ],
        differences=[
            pb.ScoreDifference(
                version=2,
                scorer=pb.SCORER_CONTAINS,
                difference=0.75,
                low=0.5,
                high=1,
                significant=True,
            )
        ],
        failed_count=1,
    )
    return fake


@pytest.fixture
async def target(adapters: FakeAdapters) -> AsyncIterator[str]:
    async with served(adapters) as target:
        yield target


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "held_out.jsonl"
    path.write_text(
        '{"text": "ahoy", "expected": "matey", "contains": ["m", "y"]}\n'
        "\n"
        '{"chat": {"messages": [{"role": "user", "content": "hi"}]}}\n'
    )
    return path


async def test_compare_marks_the_differences_that_are_significant(
    target: str, adapters: FakeAdapters
) -> None:
    adapters.comparison = pb.CompareVersionsResponse(
        arms=[
            pb.ArmReport(
                version=version,
                request_count=20,
                codes={"OK": 19, code: 1},
                ttft_ms=pb.Quantiles(count=19, p50=10 * version, p95=30),
            )
            for version, code in ((1, "INTERNAL"), (2, "INVALID_ARGUMENT"))
        ],
        differences=[
            pb.ArmDifference(
                version=2, measure="ttft_ms.p50", difference=10, low=5, high=15, significant=True
            ),
            pb.ArmDifference(version=2, measure="ttft_ms.p95", difference=0, low=-2, high=2),
        ],
    )
    output = await answered(
        *("compare", "pirate", "--versions", "1,2", "--window", "60", "--confidence", "0.9"),
        target=target,
    )
    lines = {line.split()[0]: line for line in output.splitlines()}
    assert lines["version"].split() == ["version", "1", "(baseline)", "version", "2"]
    assert " ".join(lines["codes"].split()) == ("codes INTERNAL 1, OK 19 INVALID_ARGUMENT 1, OK 19")
    assert lines["error_ratio"].split() == ["error_ratio", "0.05", "0"]
    assert lines["ttft_ms.p50"].split(maxsplit=2)[2].strip() == "20 +10* [5, 15]"
    assert lines["ttft_ms.p95"].split(maxsplit=2)[2].strip() == "30 +0 [-2, 2]"
    assert lines["feedback.mean"].split()[1:] == ["-", "-"]
    assert lines["*"].startswith("* the confidence interval")
    assert adapters.requests == [
        pb.CompareVersionsRequest(adapter="pirate", versions=[1, 2], window_s=60, confidence=0.9)
    ]
    document = json.loads(await answered("compare", "pirate", "--json", target=target))
    assert document["differences"][0]["significant"] is True


async def test_compare_without_traffic_says_so(target: str) -> None:
    output = await answered("compare", "pirate", target=target)
    assert output == "no version has answered a request yet\n"


async def test_evaluate_sends_the_examples_and_shows_the_scores(
    target: str, adapters: FakeAdapters, data: Path
) -> None:
    output = await answered(
        *("evaluate", "pirate", "--versions", "0,2", "--data", str(data)),
        *("--scorer", "contains", "--scorer", "exact_match"),
        *("--max-tokens", "8", "--max-concurrency", "2"),
        target=target,
    )
    _, base, second, *others = output.splitlines()
    assert base.split() == ["base", "contains", "0.25", "0", "to", "0.5", "2"]
    assert second.split()[:2] == ["2", "contains"]
    assert "+0.75* [0.5, 1]" in second
    assert others[0].startswith("failed answers: 1")
    assert others[1].startswith("* ")
    assert adapters.requests == [
        pb.EvaluateVersionRequest(
            adapter="pirate",
            versions=[0, 2],
            examples=EXAMPLES,
            scorers=[pb.SCORER_CONTAINS, pb.SCORER_EXACT_MATCH],
            max_tokens=8,
            max_concurrency=2,
        )
    ]


async def test_evaluate_prints_each_answer_if_asked(target: str, data: Path) -> None:
    arguments = ("evaluate", "pirate", "--versions", "0,2", "--data", str(data), "--results")
    lines = (await answered(*arguments, target=target)).splitlines()
    assert lines[:4] == [
        "#0 version base: contains=1: answer 0",
        "#0 version 2: contains=1: answer 0",
        "#1 version base: contains=1: answer 1",
        "#1 version 2: contains=1: answer 1",
    ]

    documents = [
        json.loads(line)
        for line in (await answered(*arguments, "--json", target=target)).splitlines()
    ]
    assert [list(document) for document in documents] == [*[["result"]] * 4, ["summary"]]


async def test_an_evaluation_that_was_cut_is_an_error(
    target: str, adapters: FakeAdapters, data: Path
) -> None:
    adapters.evaluation_cut = True
    arguments = ("evaluate", "pirate", "--versions", "1", "--data", str(data))
    result = await run(*arguments, target=target)
    assert (result.code, result.output) == (1, "")
    assert result.errors.startswith("error: DATA_LOSS: ")


@pytest.mark.parametrize("line", ["{", '{"txt": "misspelt"}', '{"expected": 1}', "\xff"])
async def test_a_line_that_is_no_example_is_named(
    target: str, adapters: FakeAdapters, data: Path, line: str
) -> None:
    with data.open("ab") as file:
        file.write(line.encode("latin-1"))
    arguments = ("evaluate", "pirate", "--versions", "1", "--data", str(data))
    result = await run(*arguments, target=target)
    assert (result.code, result.output) == (1, "")
    assert result.errors.startswith(f"error: {data}:4: ")
    assert not adapters.requests


async def test_versions_that_are_no_numbers_are_refused(target: str, data: Path) -> None:
    arguments = ("evaluate", "pirate", "--versions", "one", "--data", str(data))
    result = await run(*arguments, target=target)
    assert result.code == 2
    assert "no version numbers" in result.errors


@pytest.mark.parametrize("score", ["0.5", "-1"])
async def test_feedback_is_sent_below_zero_too(
    target: str, adapters: FakeAdapters, score: str
) -> None:
    assert await answered("feedback", "request-1", score, target=target) == "pirate@2\n"
    assert adapters.requests == [
        pb.RecordFeedbackRequest(request_id="request-1", score=float(score))
    ]
