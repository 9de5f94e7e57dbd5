"""What becomes of chats that have too many tokens. Neither policy cuts inside a turn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from trainer.formats import SYSTEM, USER, Turn
from trainer.masks import Draft, MaskedRow, Masks
from trainer.spec import DataSpec, OverlengthPolicy


@dataclass(frozen=True, slots=True)
class Fit:
    """What was made of one chat."""

    row: MaskedRow | None
    """None: it is left out, being too long."""
    turns_left_out: int = 0


class Overlength:
    """Makes rows that are not too long."""

    def __init__(self, masks: Masks, data: DataSpec) -> None:
        """`data` has every field set."""
        assert data.max_row_tokens and data.max_sequence_tokens
        assert data.reserve_tokens is not None and data.overlength is not None
        self._masks = masks
        self._policy = data.overlength
        if self._policy is OverlengthPolicy.DROP:
            self.max_tokens = min(data.max_row_tokens, data.max_sequence_tokens)
        else:
            self.max_tokens = data.max_sequence_tokens - data.reserve_tokens

    def fit(self, turns: Sequence[Turn]) -> Fit:
        """The row of a chat, if it is short enough or may be shortened. Raises BadLine."""
        draft = self._masks.draft(turns, max_tokens=self.max_tokens)
        if draft is None and self._policy is OverlengthPolicy.TRUNCATE_TURNS:
            draft = self._shortened(turns)
        if draft is None:
            return Fit(None)
        return Fit(self._masks.mask(draft), draft.left_out)

    def _shortened(self, turns: Sequence[Turn]) -> Draft | None:
        """As many of the last turns as fit, after the system turn and from a user turn on."""
        system = [turn for turn in turns[:1] if turn.role == SYSTEM]
        begins = [i for i, turn in enumerate(turns) if i > len(system) and turn.role == USER]
        found: Draft | None = None
        low, high = 0, len(begins)
        while low < high:  # the later it begins, the shorter it is
            middle = (low + high) // 2
            draft = self._masks.draft(
                [*system, *turns[begins[middle] :]],
                max_tokens=self.max_tokens,
                left_out=begins[middle] - len(system),
            )
            if draft is None:
                low = middle + 1
            else:
                found, high = draft, middle
        return found
