"""What the benchmark of loads found, by loader, and which targets that meets."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

NONE, VLLM, STAGED = "no loads", "vLLM's loader", "staged"
KINDS = (NONE, VLLM, STAGED)

MOST_GAP_RATIO = 1.5
"""Of the 99.9th percentile of gaps between tokens, while adapters load, to that without."""


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that such a share of all does not exceed; NaN if there are none."""
    if not values:
        return math.nan
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


@dataclass(slots=True)
class Row:
    """One way of loading, over all rounds."""

    gaps_s: list[float] = field(default_factory=list)
    """Between two outputs of one stream."""
    rounds_s: list[float] = field(default_factory=list)
    """The 99.9th percentile of gaps in each round."""
    loads_s: list[float] = field(default_factory=list)
    """While others decode."""
    first_tokens_s: list[float] = field(default_factory=list)
    """From the wish for an adapter on disk to its first token, with nothing else to do."""

    def add_gaps(self, gaps_s: Sequence[float]) -> None:
        """Of one round."""
        self.gaps_s.extend(gaps_s)
        self.rounds_s.append(percentile(gaps_s, 0.999))


@dataclass(slots=True)
class Rows:
    """All of them."""

    rows: dict[str, Row] = field(default_factory=lambda: {kind: Row() for kind in KINDS})
    warm_s: list[float] = field(default_factory=list)
    """First tokens of an adapter that has its slot."""
    cached_s: list[float] = field(default_factory=list)
    """First tokens of one that is in host memory, and has none."""
    answers_equal: list[bool] = field(default_factory=list)
    """Whether an adapter answers the same after either loader, to the token."""

    def gap_ratio(self, kind: str) -> float:
        """Of the 99.9th percentiles: the median over the rounds, each against its own without
        loads."""
        pairs = zip(self.rows[kind].rounds_s, self.rows[NONE].rounds_s, strict=False)
        return statistics.median([loading / none for loading, none in pairs])

    def added_s(self, times_s: Sequence[float], share: float) -> float:
        """How much later a first token comes than the median of a warm adapter."""
        return percentile(times_s, share) - statistics.median(self.warm_s)

    def table(self) -> str:
        """For people."""
        heads = "     p50     p99   p99.9     max   p99.9 ratio  loads, ms"
        lines = [f"{'gaps between tokens, ms':<29}{heads}"]
        for kind, row in self.rows.items():
            if not row.gaps_s:
                continue
            shown = [1000 * percentile(row.gaps_s, share) for share in (0.5, 0.99, 0.999, 1.0)]
            ratio = "" if kind == NONE else f"{self.gap_ratio(kind):.2f}"
            loads = f"{1000 * statistics.median(row.loads_s):.1f}" if row.loads_s else ""
            figures = "".join(f"{value:8.2f}" for value in shown)
            lines.append(f"{kind:<29}{figures}{ratio:>14}{loads:>11}")
        if self.warm_s:
            lines.append("first token, ms later than a warm adapter's    p50     p99")
            for name, times_s in (
                *((f"from disk, {kind}", self.rows[kind].first_tokens_s) for kind in KINDS[1:]),
                ("from host memory", self.cached_s),
            ):
                if times_s:
                    shown = [1000 * self.added_s(times_s, share) for share in (0.5, 0.99)]
                    lines.append(f"{name:<42}" + "".join(f"{value:8.2f}" for value in shown))
        equal = f"{sum(self.answers_equal)} of {len(self.answers_equal)}"
        lines.append(f"adapters that answer the same after either loader: {equal}")
        return "\n".join([*lines, self.verdict()])

    def verdict(self) -> str:
        """Of the target that any machine can show."""
        ratio = self.gap_ratio(STAGED)
        said = "reached" if ratio <= MOST_GAP_RATIO else "MISSED"
        return (
            f"target: p99.9 of gaps while adapters load <= {MOST_GAP_RATIO} times that without: "
            f"{said}, {ratio:.2f}"
        )

    def raw(self) -> dict[str, Any]:
        """For programs: seconds."""
        return {
            "warm": self.warm_s,
            "cached": self.cached_s,
            "answers_equal": self.answers_equal,
            "rows": {
                kind: {
                    "p999_by_round": row.rounds_s,
                    "p50": percentile(row.gaps_s, 0.5),
                    "max": percentile(row.gaps_s, 1.0),
                    "gaps": len(row.gaps_s),
                    "loads": row.loads_s,
                    "first_tokens": row.first_tokens_s,
                }
                for kind, row in self.rows.items()
            },
        }
