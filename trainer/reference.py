"""What the trainer's model says of some rows, for the gate to compare with the engine.

Written into each checkpoint by the training process, in the precision and quantization of the
training. The rows are held out where rows are, else the first of those trained on.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

MAX_ROWS = 16
MAX_ROW_TOKENS = 512
"""Longer rows are cut: the gate's time is bounded by both."""


class _Written(BaseModel):
    """Base of what is in the file."""

    # A trainer's NaN is written as NaN. As null, which is pydantic's own way, the file could not be
    # read again, and the adapter was said to have no reference and not to be broken.
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")


class ReferenceRow(_Written):
    """One row."""

    token_ids: tuple[int, ...]
    positions: tuple[int, ...]
    """Indices into `token_ids` of the tokens that are trained on; from 1 up."""
    logprobs: tuple[float, ...]
    """Of each of these tokens after those before it, in nats, by the model with the adapter."""
    base_logprobs: tuple[float, ...] | None = None
    """The same by the model without it; None: an older release wrote it."""


class Reference(_Written):
    """Rows with what the trainer says of them."""

    rows: tuple[ReferenceRow, ...]
    trained_as: str
    """For example `nf4/bfloat16`."""
    held_out: bool
