"""Texts that more people see than the log."""

from __future__ import annotations

import pytest

from gateway.words import MOST_CHARACTERS, for_people


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (
            "cannot open /var/lib/gateway/state/jobs/3f/log.txt: no space",
            "cannot open log.txt: no space",
        ),
        ("'/home/ann/models/llama' is no model", "'llama' is no model"),
        ("/srv/models/llama", "llama"),
        ("meta-llama/Llama-3.2-1B", "meta-llama/Llama-3.2-1B"),
        ("see https://host/a/b/c", "see https://host/a/b/c"),
        ("12 tokens/s, 3/4 of /metrics", "12 tokens/s, 3/4 of /metrics"),
        ("two\n  lines\t here", "two lines here"),
        ("<script>alert(1)</script>", "<script>alert(1)</script>"),
    ],
)
def test_folders_are_left_out_and_all_else_stays(text: str, shown: str) -> None:
    assert for_people(text) == shown


def test_a_long_text_is_cut() -> None:
    assert for_people("x" * MOST_CHARACTERS) == "x" * MOST_CHARACTERS
    cut = for_people("x" * (MOST_CHARACTERS + 1))
    assert len(cut) == MOST_CHARACTERS and cut.endswith("x…")
