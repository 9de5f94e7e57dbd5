"""A traffic split: which version answers, by weight, the same one for the same key.

Weighted rendezvous hashing (Thaler and Ravishankar 1998; weights after Schindelhauer and
Schomaker 2005): each arm draws a score from the key, and the highest wins. A key therefore
moves only to an arm whose weight grew or from one whose weight shrank; from 90:10 to 80:20
exactly the difference moves. The hash is xxh3 and not Python's own, because all workers, and
the same worker after a restart, must decide alike.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import xxhash

from store.records import Arm

_HASHES = float(2**64)


class Split:
    """The arms of one adapter. Immutable."""

    __slots__ = ("_only", "arms")

    def __init__(self, arms: Sequence[Arm]) -> None:
        self.arms = tuple(arms)
        self._only = self.arms[0].version if len(self.arms) == 1 else None

    def pick(self, key: str) -> int | None:
        """The version that answers `key`; None if no version has traffic.

        Equal keys get equal answers; over many keys each arm gets its weight's share.
        """
        if self._only is not None:
            return self._only
        hashed = key.encode()
        best, best_score = None, 0.0
        for arm in self.arms:
            # Uniform in (0, 1); -weight / log of it is the score.
            draw = (xxhash.xxh3_64_intdigest(hashed, seed=arm.version) + 0.5) / _HASHES
            score = -arm.weight / math.log(draw) if draw < 1.0 else math.inf
            if score > best_score:
                best, best_score = arm.version, score
        return best
