"""Writes down what the trainer's model says of some rows; see `trainer/reference.py`."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from trainer.reference import MAX_ROW_TOKENS, MAX_ROWS, Reference, ReferenceRow
from trainer.rows import IGNORED

STOPPING_S = 2.0
"""How long scoring may take in a run that was asked to end; one row is always scored."""


class Scorer:
    """Scores the same rows at every checkpoint."""

    def __init__(
        self,
        rows: Sequence[Mapping[str, list[int]]],
        *,
        held_out: bool,
        trained_as: str,
        autocast: Callable[[], Any],
    ) -> None:
        """`rows` are tried from the first on; `autocast` makes the training's own context."""
        self._rows = rows
        self._held_out = held_out
        self._trained_as = trained_as
        self._autocast = autocast
        self._base: dict[int, tuple[float, ...]] = {}
        """What the model says without the adapter, by index of the row: always the same."""

    def score(self, model: Any, hurried: Callable[[], bool]) -> Reference:
        """By the model as it stands, which is PEFT's; of fewer rows once `hurried` says so."""
        model.eval()
        began_s = time.monotonic()
        scored: list[ReferenceRow] = []
        for index, row in enumerate(self._rows):
            if scored and hurried() and time.monotonic() - began_s > STOPPING_S:
                break
            if len(scored) == MAX_ROWS:
                break
            token_ids, positions = window(row["input_ids"], row["labels"])
            if not positions:
                continue
            if index not in self._base:
                with model.disable_adapter():
                    self._base[index] = self._logprobs(model, token_ids, positions)
            scored.append(
                ReferenceRow(
                    token_ids=tuple(token_ids),
                    positions=tuple(positions),
                    logprobs=self._logprobs(model, token_ids, positions),
                    base_logprobs=self._base[index],
                )
            )
        return Reference(rows=tuple(scored), trained_as=self._trained_as, held_out=self._held_out)

    def _logprobs(
        self, model: Any, token_ids: list[int], positions: list[int]
    ) -> tuple[float, ...]:
        device = next(model.parameters()).device
        ids = torch.tensor([token_ids], device=device)
        with torch.no_grad(), self._autocast():
            logits = model(
                input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False
            ).logits[0]
        # The logits at one position are of the token at the next.
        before = torch.tensor(positions, device=device) - 1
        targets = ids[0, before + 1]
        logprobs = torch.log_softmax(logits[before].float(), dim=-1)
        chosen = logprobs.gather(1, targets[:, None])[:, 0]
        return tuple(chosen.tolist())


def window(token_ids: list[int], labels: list[int]) -> tuple[list[int], list[int]]:
    """At most MAX_ROW_TOKENS of a row, and which of these are trained on.

    From the start, as the engine will see rows; further on if nothing is trained there.
    """
    trained = [at for at, label in enumerate(labels) if at and label != IGNORED]
    if not trained:
        return [], []
    start = 0 if trained[0] < MAX_ROW_TOKENS else trained[0] - MAX_ROW_TOKENS // 2
    end = start + MAX_ROW_TOKENS
    return token_ids[start:end], [at - start for at in trained if start < at < end]
