"""`gateway datasets`, against a real gRPC server in this process."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from lora_gateway.v1 import training_pb2 as pb
from tests.client.fake_training import FakeTraining, served
from tests.gateway.training_command import invoked, printed, rows

REPLACED = "\N{REPLACEMENT CHARACTER}"


@pytest.fixture
def training() -> FakeTraining:
    training = FakeTraining()
    training.add_dataset("data")
    return training


@pytest.fixture
async def target(training: FakeTraining) -> AsyncIterator[str]:
    async with served(training) as target:
        yield target


async def test_datasets_are_uploaded_listed_shown_and_deleted(
    target: str, training: FakeTraining, tmp_path: Path
) -> None:
    path = tmp_path / "Rows.jsonl"
    path.write_bytes(b'{"prompt": "a", "completion": "b"}\n')
    arguments = ("--name", "mine", "--format", "prompt_completion")
    shown = rows(await printed("datasets", "upload", str(path), *arguments, target=target))
    assert (shown["dataset"], shown["format"]) == ("mine", "prompt_completion")
    assert training.content["mine"] == path.read_bytes()

    header, *lines = (await printed("datasets", "list", target=target)).splitlines()
    assert header.split() == ["dataset", "format", "size", "created", "sha256"]
    assert [line.split()[0] for line in lines] == ["data", "mine"]
    document = json.loads(await printed("datasets", "show", "mine", "--json", target=target))
    assert document["size_bytes"] == "35"

    assert await printed("datasets", "delete", "mine", target=target) == "deleted dataset mine\n"
    assert (await invoked("datasets", "show", "mine", target=target)).code == 1


async def test_validate_lists_what_is_wrong_and_says_so_by_its_code(
    target: str, training: FakeTraining
) -> None:
    training.report = pb.DatasetReport(
        valid=False,
        reasons=["2 of 4 lines are bad"],
        format=pb.DATASET_FORMAT_CHAT,
        total_lines=4,
        bad_lines=2,
        rows=2,
        duplicate_rows=1,
        duplicate_lines=[4],
        issue_counts={"NOT_JSON": 1, "WRONG_ROLE": 1},
        issues=[
            pb.LineIssue(
                line=2,
                code=pb.LINE_ISSUE_CODE_WRONG_ROLE,
                field="messages[0].role",
                message="'\x1b[31mbot' is no role",
            )
        ],
        tokens=pb.TokenStatistics(
            total=100,
            trained=40,
            mean=50,
            p50=40,
            p95=60,
            max=60,
            histogram=[
                pb.LengthBucket(up_to=32, rows=1),
                pb.LengthBucket(up_to=64, rows=1000),
            ],
        ),
    )
    arguments = ("--max-issues", "1", "--max-bad-ratio", "0.5", "--format", "chat")
    result = await invoked("datasets", "validate", "data", *arguments, target=target)
    assert (result.code, result.errors) == (1, "")
    shown = rows(result.output)
    assert shown["valid"] == "no"
    assert shown["bad lines"] == "2 (NOT_JSON 1, WRONG_ROLE 1)"
    assert shown["duplicates"] == "1 (lines 4)"
    assert shown["tokens"] == "100, 40 of them trained on (40%)"
    assert f"WRONG_ROLE  messages[0].role  '{REPLACED}[31mbot' is no role" in result.output
    assert "1 more bad lines are not shown" in result.output
    assert "not valid: 2 of 4 lines are bad" in result.output
    # The one row is seen beside the thousand.
    bars = [line.split()[-1] for line in result.output.splitlines() if "█" in line]
    assert [len(bar) for bar in bars] == [1, 40]
    assert training.requests[-1] == pb.ValidateDatasetRequest(
        dataset="data",
        max_issues=1,
        data=pb.DataSpec(max_bad_ratio=0.5, format=pb.DATASET_FORMAT_CHAT),
    )


async def test_preview_tells_what_is_trained_on(target: str, training: FakeTraining) -> None:
    training.preview = pb.PreviewTokensResponse(
        tokens=[
            pb.PreviewToken(id=1, text="<user>\n"),
            pb.PreviewToken(id=7, text=" hi\x1b", trained=True),
        ],
        kept=False,
        reason="it has 2000 tokens",
        mismatch="token 1 is 5 at the server",
    )
    output = await printed("datasets", "preview", "data", "3", target=target)
    header, first, second, *rest = output.splitlines()
    assert header.split() == ["id", "trained", "text"]
    assert first.split() == ["1", "no", "<user>\\n"]
    assert second.split() == ["7", "yes", "hi\\x1b"]
    assert rest == [
        "2 tokens, 1 of them trained on",
        "left out: it has 2000 tokens",
        "no match with the server: token 1 is 5 at the server",
    ]
    assert training.requests[-1] == pb.PreviewTokensRequest(
        dataset="data", line=3, data=pb.DataSpec()
    )
