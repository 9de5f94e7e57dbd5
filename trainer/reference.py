"""What the trainer's model says of some rows, for the gate to compare with the engine.

Written into each checkpoint by the training process, in the precision and quantization of the
training. The rows are held out where rows are, else the first of those trained on.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

MAX_ROWS = 16
MAX_ROW_TOKENS = 512
"""Longer rows are cut: the gate's time is bounded by both."""


class ReferenceRow(BaseModel):
    """One row."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    token_ids: tuple[int, ...]
    positions: tuple[int, ...]
    """Indices into `token_ids` of the tokens that are trained on; from 1 up."""
    logprobs: tuple[float, ...]
    """Of each of these tokens after those before it, in nats, by the model with the adapter."""


class Reference(BaseModel):
    """Rows with what the trainer says of them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rows: tuple[ReferenceRow, ...]
    trained_as: str
    """For example `nf4/bfloat16`."""
    held_out: bool
