"""What limits of a resolved DataSpec depend on each other and on the server.

Asked before a job, a validation and a preview alike, so that none takes what another refuses.
"""

from __future__ import annotations

from collections.abc import Iterator

from trainer.errors import InvalidSpec, UnservableAdapter
from trainer.publisher import Finding
from trainer.spec import DataSpec


def contradictions(data: DataSpec, path: str) -> Iterator[Finding]:
    """Fields that others leave no room for; `path` is the spec's own in the request."""
    assert data.max_sequence_tokens and data.max_row_tokens and data.reserve_tokens is not None
    if data.max_row_tokens > data.max_sequence_tokens:
        yield Finding(
            f"{path}.max_row_tokens",
            f"is above max_sequence_tokens ({data.max_sequence_tokens}): lower it",
        )
    if data.reserve_tokens >= data.max_sequence_tokens:
        yield Finding(
            f"{path}.reserve_tokens",
            f"leaves nothing of max_sequence_tokens ({data.max_sequence_tokens}): lower it",
        )


def unservable(data: DataSpec, path: str, max_model_len: int) -> Iterator[Finding]:
    """Fields that the server's context has no room for."""
    assert data.max_sequence_tokens
    if data.max_sequence_tokens > max_model_len:
        yield Finding(
            f"{path}.max_sequence_tokens",
            f"rows of {data.max_sequence_tokens} tokens cannot be served, but {max_model_len} at "
            "most: lower it",
        )


def require_usable(data: DataSpec, path: str, max_model_len: int) -> None:
    """Raise InvalidSpec or UnservableAdapter for what CreateJob would refuse."""
    if wrong := list(contradictions(data, path)):
        raise InvalidSpec(*wrong)
    if found := list(unservable(data, path, max_model_len)):
        raise UnservableAdapter(found)
