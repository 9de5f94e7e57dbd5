"""Prepared rows as a trainer takes them: split, and padded to the longest of a micro-batch."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.compute as pc
from transformers import AutoTokenizer, DataCollatorForSeq2Seq

from trainer.rows import IGNORED, ROWS_FILE
from trainer.steps import held_out_count

COLUMNS = ("input_ids", "labels")


@dataclass(frozen=True, slots=True)
class Rows:
    """What is trained on, and what is held out."""

    train: datasets.Dataset
    held_out: datasets.Dataset | None
    """None: nothing is."""

    def longest(self, count: int) -> datasets.Dataset:
        """Of those trained on, the longest first; fewer if there are fewer."""
        lengths = pc.list_value_length(self.train.data.column("input_ids")).to_numpy()
        if self.train._indices is not None:
            lengths = lengths[self.train._indices.column(0).to_numpy()]
        return self.train.select(np.argsort(-lengths, kind="stable")[:count])


@dataclass(frozen=True, slots=True)
class BatchTokens:
    """Of one micro-batch, without padding."""

    seen: int
    trained: int
    """That the loss counts: the first of a row follows nothing, so it is never among them."""


class Collator:
    """Makes micro-batches, and keeps count of their tokens in the order they are made in.

    `input_ids`, `attention_mask` and `labels` of shape [rows, longest row].
    """

    def __init__(self, model: Path) -> None:
        tokenizer = AutoTokenizer.from_pretrained(model, padding_side="right")
        if tokenizer.pad_token is None:
            # Any will do: it is masked out of attention and of the loss.
            tokenizer.pad_token = tokenizer.eos_token
        self._pad = DataCollatorForSeq2Seq(tokenizer, padding=True, label_pad_token_id=IGNORED)
        self.made: deque[BatchTokens] = deque()
        """Of micro-batches that nobody has asked about. Batches are made a step ahead of use."""

    def __call__(self, rows: Sequence[Mapping[str, list[int]]]) -> Any:
        self.made.append(
            BatchTokens(
                seen=sum(len(row["input_ids"]) for row in rows),
                trained=sum(trained_tokens(row["labels"]) for row in rows),
            )
        )
        return self._pad(
            [
                {
                    "input_ids": row["input_ids"],
                    "attention_mask": [1] * len(row["input_ids"]),
                    "labels": row["labels"],
                }
                for row in rows
            ]
        )


def load_rows(
    prepared: Path, eval_prepared: Path | None, *, eval_fraction: float, seed: int, cache: Path
) -> Rows:
    """Open prepared folders, mapped into memory from files in `cache`.

    Without an eval folder a fraction of the rows is held out: the same ones for the same seed.
    """
    rows = _open(prepared, cache)
    if eval_prepared is not None:
        return Rows(rows, _open(eval_prepared, cache))
    count = held_out_count(len(rows), eval_fraction)
    if not count:
        return Rows(rows, None)
    order = np.random.default_rng(seed).permutation(len(rows))
    return Rows(rows.select(np.sort(order[count:])), rows.select(np.sort(order[:count])))


def trained_tokens(labels: Sequence[int]) -> int:
    """How many of a row's labels the loss counts."""
    return sum(label != IGNORED for label in labels[1:])


def _open(prepared: Path, cache: Path) -> datasets.Dataset:
    rows = datasets.Dataset.from_parquet(
        str(prepared / ROWS_FILE), cache_dir=str(cache), keep_in_memory=False
    )
    return rows.select_columns(list(COLUMNS))
