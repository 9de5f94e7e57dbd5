"""What a job, a validation and a preview refuse of a DataSpec is the same."""

from __future__ import annotations

import pytest

from trainer.data_limits import require_usable
from trainer.errors import InvalidSpec, UnservableAdapter
from trainer.spec import DataSpec

CONTEXT = 2048


def check(**fields: int) -> None:
    require_usable(DataSpec(**fields).resolved(max_model_len=CONTEXT), "data", CONTEXT)


def test_defaults_and_limits_themselves_are_usable() -> None:
    check()
    check(max_sequence_tokens=CONTEXT, max_row_tokens=CONTEXT, reserve_tokens=CONTEXT - 1)


@pytest.mark.parametrize(
    ("fields", "kind", "said"),
    [
        ({"max_row_tokens": CONTEXT + 1}, InvalidSpec, "data.max_row_tokens: is above"),
        ({"reserve_tokens": CONTEXT}, InvalidSpec, "data.reserve_tokens: leaves nothing"),
        (
            {"max_sequence_tokens": CONTEXT + 1},
            UnservableAdapter,
            "data.max_sequence_tokens: rows of 2049 tokens cannot be served",
        ),
    ],
)
def test_pitfalls_what_is_not_usable_names_its_field(
    fields: dict[str, int], kind: type[Exception], said: str
) -> None:
    with pytest.raises(kind) as refused:
        check(**fields)
    assert str(refused.value).startswith(said)
