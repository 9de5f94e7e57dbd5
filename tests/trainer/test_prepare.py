"""A dataset becomes rows and a report, which says what is wrong and what to do."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.trainer.prepared import GOOD, data_spec, exchange, prepared, rows_of, write_lines
from tests.trainer.templates import Models, server_of
from trainer.prepare import prepare
from trainer.prepare_plan import PreparePlan
from trainer.report import MAX_ISSUES, LineIssueCode
from trainer.rows import IGNORED, ROWS_FILE
from trainer.spec import DatasetFormat, OverlengthPolicy


def test_good_lines_become_rows_in_order(tiny: Path, tmp_path: Path) -> None:
    lines = [exchange("one", "two"), b"{", exchange("three", "four five six"), b""]
    path = write_lines(tmp_path / "d", lines)
    report = prepared(tiny, path, tmp_path / "p", max_bad_ratio=0.5)
    assert (report.valid, report.reasons) == (True, ())
    assert report.format is DatasetFormat.CHAT
    assert (report.total_lines, report.bad_lines, report.rows) == (4, 2, 2)
    assert [(issue.line, issue.code) for issue in report.issues] == [
        (2, LineIssueCode.NOT_JSON),
        (4, LineIssueCode.EMPTY),
    ]
    assert report.issue_counts == {LineIssueCode.NOT_JSON: 1, LineIssueCode.EMPTY: 1}
    rows = rows_of(tmp_path / "p")
    assert [row["line"] for row in rows] == [1, 3]
    for row in rows:
        assert len(row["input_ids"]) == len(row["labels"])
        assert IGNORED in row["labels"]
    lengths = [len(row["input_ids"]) for row in rows]
    trained = sum(label != IGNORED for row in rows for label in row["labels"])
    tokens = report.tokens
    assert (tokens.total, tokens.max, tokens.trained) == (sum(lengths), max(lengths), trained)


def test_the_columns_are_what_the_training_process_reads(tiny: Path, tmp_path: Path) -> None:
    prepared(tiny, write_lines(tmp_path / "d", [GOOD]), tmp_path / "p")
    schema = pq.read_schema(tmp_path / "p" / ROWS_FILE)
    assert schema.names == ["line", "input_ids", "labels"]
    assert schema.types == [pa.int64(), pa.list_(pa.int32()), pa.list_(pa.int32())]


@pytest.mark.parametrize("limit", ["BATCH_ROWS", "BATCH_TOKENS"])
def test_rows_of_several_batches_are_all_there(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    monkeypatch.setattr(f"trainer.rows_file.{limit}", 100)
    path = write_lines(tmp_path / "d", [exchange(str(i), "b") for i in range(250)])
    assert prepared(tiny, path, tmp_path / "p").rows == 250
    rows = rows_of(tmp_path / "p")
    assert [row["line"] for row in rows] == list(range(1, 251))
    texts = [server_of(tiny).text(row["input_ids"]) for row in rows]
    assert all(f"user\n{i}<|im_end|>" in text for i, text in enumerate(texts))
    assert all(row["labels"][-2] == row["input_ids"][-2] for row in rows)


@pytest.mark.parametrize(
    ("line", "field"),
    [
        ({"prompt": "<|im_start|>", "completion": "b"}, "prompt"),
        ({"prompt": "a", "completion": "<|im_start|>"}, "completion"),
        ({"instruction": "a", "output": "<|im_start|>"}, "output"),
        ({"instruction": "a", "input": "<|im_start|>", "output": "b"}, "instruction"),
    ],
)
def test_an_issue_names_the_field_of_its_own_format(
    tiny: Path, tmp_path: Path, line: dict[str, str], field: str
) -> None:
    report = prepared(tiny, write_lines(tmp_path / "d", [line]), tmp_path / "p")
    [issue] = report.issues
    assert (issue.code, issue.field) == (LineIssueCode.DOUBLE_BOS, field)


def test_the_format_that_was_said_is_used(tiny: Path, tmp_path: Path) -> None:
    line = {**GOOD, "prompt": "x", "completion": "yyyy"}
    path = write_lines(tmp_path / "d", [line])
    chat = prepared(tiny, path, tmp_path / "p")
    pair = prepared(tiny, path, tmp_path / "q", format=DatasetFormat.PROMPT_COMPLETION)
    assert (chat.format, pair.format) == (DatasetFormat.CHAT, DatasetFormat.PROMPT_COMPLETION)
    assert pair.tokens.trained > chat.tokens.trained


def test_what_the_policies_leave_out_is_counted_and_listed(tiny: Path, tmp_path: Path) -> None:
    long, talk = exchange("word " * 300, "b"), {"messages": GOOD["messages"] * 12}
    path = write_lines(tmp_path / "d", [GOOD, long, talk])
    dropped = prepared(tiny, path, tmp_path / "p", max_row_tokens=100)
    assert (dropped.rows, dropped.overlength_rows, dropped.overlength_lines) == (1, 2, (2, 3))
    assert dropped.truncated_rows == 0
    shortened = prepared(
        tiny,
        path,
        tmp_path / "q",
        max_sequence_tokens=150,
        overlength=OverlengthPolicy.TRUNCATE_TURNS,
    )
    assert (shortened.rows, shortened.overlength_lines, shortened.truncated_rows) == (2, (2,), 1)


def test_equal_rows_are_kept_and_told(tiny: Path, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "d", [GOOD, exchange("x", "y"), {**GOOD, "id": 3}, GOOD])
    report = prepared(tiny, path, tmp_path / "p")
    assert (report.rows, report.duplicate_rows, report.duplicate_lines) == (4, 2, (3, 4))


def test_rows_without_a_token_to_train_are_left_out(models: Models, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "d", [GOOD])
    report = prepared(models("hollow"), path, tmp_path / "p")
    assert (report.valid, report.rows, report.untrained_rows) == (False, 0, 1)
    assert "1 have no token that is trained" in "; ".join(report.reasons)


@pytest.mark.parametrize(
    ("lines", "fields", "reason"),
    [
        ([b"{", b"[]"], {"max_bad_ratio": 1.0}, "2 of 2 lines are bad"),
        ([GOOD, b"{"], {}, "1 of 2 lines are bad, and at most 5 % may be"),
        ([GOOD], {"max_row_tokens": 3}, "1 are too long: raise max_row_tokens"),
        (
            [GOOD],
            {"max_sequence_tokens": 16, "overlength": OverlengthPolicy.TRUNCATE_TURNS},
            "raise max_sequence_tokens",
        ),
        ([{"text": "a"}], {"max_bad_ratio": 1.0}, "correct them as the issues say"),
    ],
)
def test_a_dataset_that_is_not_valid_says_what_to_do(
    tiny: Path, tmp_path: Path, lines: list[Any], fields: dict[str, Any], reason: str
) -> None:
    report = prepared(tiny, write_lines(tmp_path / "d", lines), tmp_path / "p", **fields)
    assert not report.valid
    assert reason in "; ".join(report.reasons)


def test_a_model_that_cannot_chat_makes_every_dataset_invalid(
    models: Models, tmp_path: Path
) -> None:
    report = prepared(models("none"), write_lines(tmp_path / "d", [GOOD]), tmp_path / "p")
    assert not report.valid
    assert "serve a model that was trained to chat" in report.reasons[0]


def test_lists_of_lines_are_bounded_and_their_counts_are_not(tiny: Path, tmp_path: Path) -> None:
    bad = MAX_ISSUES + 3
    path = write_lines(tmp_path / "d", [GOOD, *[b"[]"] * bad])
    report = prepared(tiny, path, tmp_path / "p", max_bad_ratio=1.0)
    assert (report.valid, report.bad_lines, len(report.issues)) == (True, bad, MAX_ISSUES)
    assert report.issue_counts == {LineIssueCode.NOT_OBJECT: bad}


def test_a_dataset_that_is_refused_is_reported_to_its_end(tiny: Path, tmp_path: Path) -> None:
    refused_by_template = {"messages": [{"role": "tool", "content": ""}, GOOD["messages"][1]]}
    path = write_lines(tmp_path / "d", [*[b"{"] * 50, *[GOOD] * 49, refused_by_template])
    report = prepared(tiny, path, tmp_path / "p")
    assert (report.valid, report.total_lines, report.bad_lines) == (False, 100, 51)
    assert report.issues[-1].line == 100
    assert (report.rows, report.duplicate_rows) == (49, 48)


def test_memory_does_not_grow_with_the_file(tiny: Path, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "d", [GOOD, *[b"[" + b" " * 1024**2 + b"]"] * 60])
    tracemalloc.start()
    try:
        report = prepared(tiny, path, tmp_path / "p", max_bad_ratio=1.0)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (report.rows, report.bad_lines) == (1, 60)
    assert peak_bytes < 20 * 1024**2


def test_a_disk_that_fails_is_an_error_and_no_report(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "p").mkdir()
    plan = PreparePlan(dataset=str(tmp_path), model=str(tiny), data=data_spec())
    with pytest.raises(IsADirectoryError):
        prepare(plan, tmp_path / "p")
    assert list((tmp_path / "p").iterdir()) == []
