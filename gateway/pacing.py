"""How long a stream rests after a write, so that the next one carries more.

A message costs the event loop about 20 us whatever is in it, and one more token in it next to
nothing (docs/benchmarks.md). A write returns when the loop comes around again, so it takes the
longer, the busier the loop is. Where it is busy, a stream rests for as long as its write took, and
vLLM merges what comes meanwhile (output_processor.py:69): a loop that falls behind its engines has
less to do, and catches up. Where it is not, nothing rests, and each token goes out alone.
"""

from __future__ import annotations

BUSY_S = 0.002
"""A write that takes less is one of a loop that keeps up. Alone, it takes 0.1 ms."""
LONGEST_REST_S = 0.010
"""Of a stream whose client does not read: what merges meanwhile, merges in the write too."""


def rest_s(write_s: float) -> float:
    """How long to rest after a write that took so long; 0: not at all."""
    return 0.0 if write_s < BUSY_S else min(write_s, LONGEST_REST_S)
