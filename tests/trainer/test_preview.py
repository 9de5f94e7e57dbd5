"""A preview shows a line as it is trained, and says why it is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.trainer.prepared import GOOD, data_spec, exchange, prepared, rows_of, write_lines
from tests.trainer.templates import CHATML, Models, server_of
from trainer.errors import InvalidSpec, TrainingUnavailable
from trainer.preview import MAX_MESSAGES, MAX_TOKENS, Previewer, TokenPreview
from trainer.rows import IGNORED
from trainer.spec import DatasetFormat, LossMask, OverlengthPolicy

LINES = [
    exchange("What is 2 and 2?", "\nIt is 4.\n"),
    {
        "messages": [
            {"role": "user", "content": "hi <b>bold</b>\n\n"},
            {"role": "assistant", "content": "Yes?"},
            {"role": "user", "content": " what\tnow "},
            {"role": "user", "content": "é🙂"},
            {"role": "assistant", "content": "done"},
        ]
    },
    exchange("", "x" * 200),
]


def preview(model: Path, path: Path, line: int = 1, **fields: Any) -> TokenPreview:
    return Previewer(model).preview(path, line, data_spec(**fields))


@pytest.mark.parametrize("template", [CHATML, "llama", "gemma", "inst", "thinking", "joined"])
@pytest.mark.parametrize("loss_mask", LossMask)
def test_parity_masks_of_prepared_rows_are_those_of_the_preview_and_of_the_server(
    models: Models, tmp_path: Path, template: str, loss_mask: LossMask
) -> None:
    model, path = models(template), write_lines(tmp_path / "d", LINES)
    report = prepared(model, path, tmp_path / "p", loss_mask=loss_mask)
    assert report.rows == len(LINES)
    previewer = Previewer(model)
    for row in rows_of(tmp_path / "p"):
        shown = previewer.preview(path, row["line"], data_spec(loss_mask=loss_mask))
        assert (shown.kept, shown.reason) == (True, "")
        assert [token.id for token in shown.tokens] == row["input_ids"]
        trained = [label != IGNORED for label in row["labels"]]
        assert [token.trained for token in shown.tokens] == trained
        assert shown.text == server_of(model).text(row["input_ids"])
        answers = sum(
            message["role"] == "assistant" for message in LINES[row["line"] - 1]["messages"]
        )
        assert len(shown.bounds) == (1 if loss_mask is LossMask.LAST_ASSISTANT else answers)
        for messages, ids in map(shown.prompt, range(len(shown.bounds))):
            assert ids == server_of(model).prompt(messages)
            assert row["input_ids"][: len(ids)] == ids


def test_tokens_are_shown_with_their_own_text(tiny: Path, tmp_path: Path) -> None:
    shown = preview(tiny, write_lines(tmp_path / "d", [exchange("hi", "4")]))
    assert shown.text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n4<|im_end|>\n"
    assert "".join(token.text for token in shown.tokens) == shown.text
    assert [token.text for token in shown.tokens if token.trained] == ["4", "<|im_end|>"]
    assert len(shown.bounds) == 1
    assert shown.prompt(0) == ([("user", "hi")], [token.id for token in shown.tokens][:-3])


def test_a_bad_line_says_why_and_shows_nothing(tiny: Path, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "d", [GOOD, b"{", {"messages": [{"role": "boss"}]}])
    shown = preview(tiny, path, 2)
    assert shown == TokenPreview("", [], [], [], False, shown.reason)
    assert "is not JSON" in shown.reason
    assert preview(tiny, path, 3).reason.startswith("messages[0].content: is not there")


def test_a_line_is_read_as_the_file_is(tiny: Path, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "d", [{"prompt": "a", "completion": "b"}, GOOD])
    assert "looks like CHAT" in preview(tiny, path, 2).reason
    assert preview(tiny, path, 2, format=DatasetFormat.CHAT).kept


def test_a_row_that_is_too_long_is_shown_with_the_reason(tiny: Path, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "d", [exchange("word " * 50, "b")])
    shown = preview(tiny, path, max_row_tokens=20)
    assert not shown.kept and len(shown.tokens) > 50
    assert f"has {len(shown.tokens)} tokens, and may have 20 (max_row_tokens)" in shown.reason
    shown = preview(
        tiny,
        path,
        max_sequence_tokens=30,
        reserve_tokens=5,
        overlength=OverlengthPolicy.TRUNCATE_TURNS,
    )
    assert "may have 25 (max_sequence_tokens less reserve_tokens)" in shown.reason


def test_a_huge_row_is_not_shown(tiny: Path, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "d", [exchange("é🙂" * MAX_TOKENS, "b")])
    shown = preview(tiny, path)
    assert (shown.kept, shown.tokens) == (False, [])
    assert f"more than {MAX_TOKENS} tokens" in shown.reason


def test_a_row_longer_than_the_servers_context_is_not_shown(tiny: Path, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "d", [exchange("word " * 50, "b")])
    shown = Previewer(tiny, max_tokens=40).preview(path, 1, data_spec(max_row_tokens=20))
    assert (shown.kept, shown.tokens) == (False, [])
    assert "more than 40 tokens, and may have 20" in shown.reason


def test_a_line_of_too_many_messages_is_refused(tiny: Path, tmp_path: Path) -> None:
    half = MAX_MESSAGES // 2
    lines = [{"messages": GOOD["messages"] * count} for count in (half, half + 1)]
    path = write_lines(tmp_path / "d", lines)
    with pytest.raises(InvalidSpec, match=f"line: has {MAX_MESSAGES + 2} messages"):
        preview(tiny, path, 2, max_sequence_tokens=2048)
    assert "may have 1800" in preview(tiny, path, 1, max_sequence_tokens=2048).reason


def test_a_row_that_was_shortened_shows_what_is_left(tiny: Path, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "d", [{"messages": GOOD["messages"] * 10}])
    shown = preview(tiny, path, max_sequence_tokens=100, overlength=OverlengthPolicy.TRUNCATE_TURNS)
    assert not shown.kept
    assert "of its oldest messages are left out" in shown.reason
    assert 20 < len(shown.tokens) <= 50


def test_a_row_that_trains_nothing_is_shown_with_the_reason(models: Models, tmp_path: Path) -> None:
    shown = preview(models("hollow"), write_lines(tmp_path / "d", [GOOD]))
    assert not shown.kept and shown.tokens
    assert "no token that is trained" in shown.reason


@pytest.mark.parametrize("line", [3, 10_000])
def test_a_line_that_is_not_there_is_a_wrong_request(tiny: Path, tmp_path: Path, line: int) -> None:
    path = write_lines(tmp_path / "d", [GOOD, GOOD])
    with pytest.raises(InvalidSpec, match="not so many lines") as caught:
        preview(tiny, path, line)
    assert [finding.field for finding in caught.value.findings] == ["line"]


def test_what_cannot_be_shown_at_all_says_what_to_do(models: Models, tmp_path: Path) -> None:
    with pytest.raises(TrainingUnavailable, match="upload it again"):
        preview(models(CHATML), tmp_path / "gone")
    with pytest.raises(TrainingUnavailable, match="no chat template"):
        preview(models("none"), write_lines(tmp_path / "d", [GOOD]))
