"""What was measured, for people and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from tests.bench.comparison import FirstTokenComparison, ThroughputComparison
from tests.bench.h2load import PACKAGE
from tests.bench.machine import Machine

MIN_RATIO = 0.80
"""Target: tokens per second through the gateway, over those of the bare engine."""
MAX_ADDED_S = 0.002
"""Target: what the gateway adds to the time to first token."""


@dataclass(frozen=True, slots=True)
class Report:
    """All of one run."""

    machine: Machine
    model: str
    dtype: str
    load: str
    """Where the load on the gateway came from."""
    throughputs: Sequence[ThroughputComparison]
    first_tokens: Sequence[FirstTokenComparison]

    def text(self) -> str:
        """The tables, and how they were taken."""
        one, alone = self.throughputs[0], self.first_tokens[0]
        lines = [
            str(self.machine),
            f"model {self.model} in {self.dtype}; load on the gateway from {self.load}",
            "",
            f"Streaming, {one.workload.in_flight} in flight, {one.workload.tokens} tokens each: "
            f"tokens per second, median of {len(one.pairs)} pairs of rounds "
            f"of {one.workload.requests} streams",
            _row("", "bare", "gateway", "ratio (min to max)", f"target >= {MIN_RATIO:.2f}"),
            *(_throughput_row(comparison) for comparison in self.throughputs),
            "",
            f"Time to first token, one at a time: median of "
            f"{len(alone.pairs) * alone.workload.requests} requests, in {len(alone.pairs)} pairs "
            "of blocks",
            _row("", "bare", "gateway", "added (min to max)", f"target <= {_ms(MAX_ADDED_S)}"),
            *(_first_token_row(comparison) for comparison in self.first_tokens),
            "",
            "Both sides run the same engine options, are up at once and are measured in turns.",
            "bare: AsyncLLM.generate in one process, no network. min to max: over the pairs.",
        ]
        if not self.load.startswith("h2load"):
            lines.append(
                f"h2load is not installed (Debian: {PACKAGE}): the Python client takes much of "
                "the machine from the gateway."
            )
        return "\n".join(lines)

    def raw(self) -> dict[str, Any]:
        """All figures, for other programs."""
        return asdict(self)


def _throughput_row(comparison: ThroughputComparison) -> str:
    ratios = comparison.ratios
    ratio = median(ratios)
    return _row(
        comparison.name,
        f"{median(bare.tokens_per_s for bare, _ in comparison.pairs):,.0f}",
        f"{median(served.tokens_per_s for _, served in comparison.pairs):,.0f}",
        f"{ratio:.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
        "met" if ratio >= MIN_RATIO else f"missed by {MIN_RATIO - ratio:.2f}",
    )


def _first_token_row(comparison: FirstTokenComparison) -> str:
    by_block = comparison.added_s
    added_s = comparison.served_s - comparison.bare_s
    return _row(
        comparison.name,
        _ms(comparison.bare_s),
        _ms(comparison.served_s),
        f"{_ms(added_s)} ({_ms(min(by_block))} to {_ms(max(by_block))})",
        "met" if added_s <= MAX_ADDED_S else f"missed by {_ms(added_s - MAX_ADDED_S)}",
    )


def _row(*cells: str) -> str:
    name, bare, served, compared, target = cells
    return f"  {name:<24}{bare:>10}{served:>10}   {compared:<34}{target}".rstrip()


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.2f} ms"
