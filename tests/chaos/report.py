"""What the storm came to, as tables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from tests.bench.machine import Machine
from tests.chaos.blow import Blow, BlowKind
from tests.chaos.call import CallRecord


@dataclass(frozen=True, slots=True)
class Report:
    """All of one run."""

    machine: Machine
    seed: int
    took_s: float
    calls: Sequence[CallRecord]
    blows: Sequence[Blow]
    findings: Sequence[str]

    def text(self) -> str:
        """For people, and for docs/benchmarks.md."""
        return "\n".join(
            [
                f"{self.machine}",
                f"seed {self.seed}, {len(self.blows)} blows in {self.took_s / 60:.1f} min",
                "",
                "| calls by outcome | unary | streams |",
                "|---|---|---|",
                *self._outcomes(),
                "",
                "| blow | times | whole again after: median (min to max) |",
                "|---|---|---|",
                *self._recoveries(),
                "",
                f"findings: {len(self.findings)}",
                *(f"  {finding}" for finding in self.findings),
            ]
        )

    def _outcomes(self) -> list[str]:
        counts = Counter((call.outcome, call.stream) for call in self.calls)
        outcomes = sorted({call.outcome for call in self.calls})
        return [
            f"| {outcome} | {counts[outcome, False]} | {counts[outcome, True]} |"
            for outcome in outcomes
        ]

    def _recoveries(self) -> list[str]:
        rows = []
        for kind in BlowKind:
            blows = [blow for blow in self.blows if blow.kind is kind]
            took_s = [blow.whole_s - blow.at_s for blow in blows if blow.whole_s is not None]
            figure = (
                f"{median(took_s):.1f} s ({min(took_s):.1f} to {max(took_s):.1f})"
                if took_s
                else "never"
            )
            if blows:
                rows.append(f"| {kind.value} | {len(blows)} | {figure} |")
        return rows
