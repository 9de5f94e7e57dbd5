"""What goes wrong with data in tutorials on fine-tuning, and does not here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.trainer.prepared import GOOD, data_spec, exchange, prepared, rows_of, write_lines
from tests.trainer.templates import CHATML, Models, chat_of, server_of
from trainer.batches import Collator
from trainer.prepare import prepare
from trainer.prepare_plan import PreparePlan
from trainer.report import LineIssueCode
from trainer.rows import IGNORED
from trainer.spec import OverlengthPolicy


def words_of(model: Path, tokens: int) -> dict[str, Any]:
    """A line that is rendered to so many tokens."""
    mark = "\x01"  # joined with nothing, so each is a token
    base = tokens_of(model, exchange(mark, "b"))
    line = exchange(mark * (tokens - base + 1), "b")
    assert tokens_of(model, line) == tokens
    return line


def tokens_of(model: Path, line: dict[str, Any]) -> int:
    text = server_of(model).tokenizer.apply_chat_template(line["messages"], tokenize=False)
    return len(chat_of(model).encode(text))


# --- length -----------------------------------------------------------------


def test_pitfalls_rows_of_more_than_1800_tokens_are_left_out_and_listed(
    tiny: Path, tmp_path: Path
) -> None:
    assert (data_spec().max_sequence_tokens, data_spec().max_row_tokens) == (2048, 1800)
    lines = [words_of(tiny, tokens) for tokens in (1799, 1800, 1801, 2049)]
    report = prepared(tiny, write_lines(tmp_path / "d", lines), tmp_path / "p")
    assert (report.rows, report.overlength_rows, report.overlength_lines) == (2, 2, (3, 4))
    assert report.tokens.max == 1800


def test_pitfalls_truncation_keeps_whole_turns_and_reserves_50_tokens(
    tiny: Path, tmp_path: Path
) -> None:
    long = words_of(tiny, 1000)["messages"]
    lines = [{"messages": long * 3}, words_of(tiny, 1998), words_of(tiny, 1999)]
    report = prepared(
        tiny,
        write_lines(tmp_path / "d", lines),
        tmp_path / "p",
        overlength=OverlengthPolicy.TRUNCATE_TURNS,
    )
    assert data_spec().reserve_tokens == 50
    assert (report.rows, report.truncated_rows, report.overlength_lines) == (2, 1, (3,))
    shortened, exact = rows_of(tmp_path / "p")
    assert len(exact["input_ids"]) == 2048 - 50
    assert (
        shortened["input_ids"]
        == chat_of(tiny)
        .encode(server_of(tiny).tokenizer.apply_chat_template(long, tokenize=False))
        .ids
    )
    # The token that ends the answer is there, and trained: no text was cut.
    assert shortened["labels"][-2] == server_of(tiny).tokenizer.eos_token_id


# --- template ---------------------------------------------------------------


@pytest.mark.parametrize("template", ["llama", "gemma", "inst"])
def test_pitfalls_a_text_begins_once(models: Models, tmp_path: Path, template: str) -> None:
    model = models(template)
    prepared(model, write_lines(tmp_path / "d", [GOOD]), tmp_path / "p")
    [row] = rows_of(tmp_path / "p")
    bos = server_of(model).tokenizer.bos_token_id
    assert row["input_ids"].count(bos) == 1 and row["input_ids"][0] == bos


def test_pitfalls_a_text_that_would_begin_twice_is_a_bad_line(
    models: Models, tmp_path: Path
) -> None:
    path = write_lines(tmp_path / "d", [exchange("<bos>hi", "b"), GOOD])
    report = prepared(models("llama"), path, tmp_path / "p", max_bad_ratio=0.5)
    [issue] = report.issues
    assert (issue.line, issue.code) == (1, LineIssueCode.DOUBLE_BOS)
    assert "leave it out" in issue.message
    # As a template does that begins a text which the tokenizer begins, too.
    report = prepared(models("twice"), path, tmp_path / "q")
    assert [issue.code for issue in report.issues] == [LineIssueCode.DOUBLE_BOS] * 2


@pytest.mark.parametrize("template", [CHATML, "llama", "gemma"])
def test_pitfalls_a_template_that_was_applied_before_is_not_applied_again(
    models: Models, tmp_path: Path, template: str
) -> None:
    model = models(template)
    rendered = server_of(model).tokenizer.apply_chat_template(
        GOOD["messages"], tokenize=False, add_generation_prompt=True
    )
    # The first token is often left out, so that a text does not begin twice.
    bare = rendered.removeprefix(server_of(model).tokenizer.bos_token)
    for asked in (rendered, bare):
        path = write_lines(tmp_path / "d", [{"prompt": asked, "completion": "b"}])
        report = prepared(model, path, tmp_path / str(hash(asked)))
        [issue] = report.issues
        assert issue.code in (LineIssueCode.DOUBLE_BOS, LineIssueCode.TEMPLATE_REFUSED)
        assert issue.field == "prompt"
        assert "as it was before a template" in issue.message


@pytest.mark.parametrize("template", [CHATML, "llama", "gemma", "inst"])
def test_pitfalls_training_renders_with_the_template_of_serving(
    models: Models, tmp_path: Path, template: str
) -> None:
    model = models(template)
    prepared(model, write_lines(tmp_path / "d", [GOOD]), tmp_path / "p")
    [row] = rows_of(tmp_path / "p")
    prompt = server_of(model).prompt([("user", "a")])
    assert row["input_ids"][: len(prompt)] == prompt


# --- what is trained on -----------------------------------------------------


def test_pitfalls_prompts_are_not_trained_on(tiny: Path, tmp_path: Path) -> None:
    prepared(tiny, write_lines(tmp_path / "d", [GOOD]), tmp_path / "p")
    [row] = rows_of(tmp_path / "p")
    trained = [label for label in row["labels"] if label != IGNORED]
    assert server_of(tiny).text(trained) == "b<|im_end|>"


def test_pitfalls_padding_is_not_trained_on(tiny: Path, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "d", [GOOD, exchange("a", "b " * 30)])
    prepared(tiny, path, tmp_path / "p")
    short, long = rows_of(tmp_path / "p")
    batch = Collator(tiny)([short, long])
    padding = len(long["labels"]) - len(short["labels"])
    assert padding > 0 and IGNORED == -100
    assert batch["labels"][0].tolist() == short["labels"] + [-100] * padding
    assert batch["attention_mask"][0].tolist() == [1] * len(short["labels"]) + [0] * padding


def test_pitfalls_other_columns_do_not_reach_the_trainer(tiny: Path, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "d", [{**GOOD, "id": "x", "score": 0.5}])
    prepared(tiny, path, tmp_path / "p")
    assert set(rows_of(tmp_path / "p")[0]) == {"line", "input_ids", "labels"}


# --- bad lines --------------------------------------------------------------


@pytest.mark.parametrize(("bad", "valid"), [(4, True), (5, True), (6, False)])
def test_pitfalls_five_percent_of_all_lines_may_be_bad(
    tiny: Path, tmp_path: Path, bad: int, valid: bool
) -> None:
    path = write_lines(tmp_path / "d", [GOOD] * (100 - bad) + [b"{"] * bad)
    report = prepared(tiny, path, tmp_path / "p")
    assert (report.valid, report.total_lines, report.bad_lines) == (valid, 100, bad)
    if not valid:
        assert "6 of 100 lines are bad, and at most 5 % may be" in report.reasons[0]


@pytest.mark.parametrize(("ratio", "lines"), [(0.29, 100), (0.07, 100), (0.1, 30), (0.05, 140)])
def test_pitfalls_exactly_the_share_that_may_be_bad_passes(
    tiny: Path, tmp_path: Path, ratio: float, lines: int
) -> None:
    bad = round(ratio * lines)
    for more in (0, 1):
        path = write_lines(tmp_path / "d", [b"{"] * (bad + more) + [GOOD] * (lines - bad - more))
        report = prepared(tiny, path, tmp_path / f"p{more}", max_bad_ratio=ratio)
        assert report.valid == (not more)


def test_pitfalls_every_bad_line_is_told_and_not_the_first_alone(
    tiny: Path, tmp_path: Path
) -> None:
    lines = [GOOD, b"{", b"\xff", b"", b"[]", exchange("a", ""), {"messages": 1}, {"text": "a"}]
    report = prepared(tiny, write_lines(tmp_path / "d", lines), tmp_path / "p")
    assert [(issue.line, issue.code.name, issue.field) for issue in report.issues] == [
        (2, "NOT_JSON", ""),
        (3, "NOT_UTF8", ""),
        (4, "EMPTY", ""),
        (5, "NOT_OBJECT", ""),
        (6, "NO_TARGET", "messages[1].content"),
        (7, "WRONG_TYPE", "messages"),
        (8, "FIELD_MISSING", "messages"),
    ]
    assert all(len(issue.message) > 15 for issue in report.issues)
    assert sum(report.issue_counts.values()) == report.bad_lines == 7


@pytest.mark.parametrize("data", [b"", b"\xef\xbb\xbf", b"  "])
def test_pitfalls_an_empty_file_is_refused(tiny: Path, tmp_path: Path, data: bytes) -> None:
    (tmp_path / "d").write_bytes(data)
    report = prepared(tiny, tmp_path / "d", tmp_path / "p")
    assert (report.valid, report.total_lines) == (False, 0)
    assert report.reasons == ("the file has no line: upload one JSON object a line",)


def test_pitfalls_a_file_of_bad_lines_alone_is_refused_at_any_ratio(
    tiny: Path, tmp_path: Path
) -> None:
    report = prepared(
        tiny, write_lines(tmp_path / "d", [b"{"] * 3), tmp_path / "p", max_bad_ratio=1.0
    )
    assert not report.valid
    assert "no row is left to train on" in report.reasons


def test_pitfalls_a_file_that_is_not_there_is_told_with_what_to_do(
    tiny: Path, tmp_path: Path
) -> None:
    (tmp_path / "p").mkdir()
    plan = PreparePlan(dataset=str(tmp_path / "gone"), model=str(tiny), data=data_spec())
    report = prepare(plan, tmp_path / "p")
    assert not report.valid
    assert "not there any more: delete the dataset, and upload it again" in report.reasons[0]
