"""The targets, each with what was found and whether that meets it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tests.bench.comparison import FirstTokens, Throughput
from tests.bench.front_end import Kind

MANY = 128
"""In flight where ratios have targets."""
MAX_ADDED_S = 0.0007
"""What the gateway adds to the time to first token."""


@dataclass(frozen=True, slots=True)
class Target:
    """The least that the gateway must do, over another side, with MANY in flight."""

    streaming: bool
    adapter: bool
    base: Kind
    ratio: float
    binding: bool = True
    """Else it is reported and aimed at."""


TARGETS = (
    Target(True, True, Kind.GENERATE, 0.95),
    Target(True, True, Kind.PYTHON_HTTP, 1.6),
    Target(True, False, Kind.PYTHON_HTTP, 1.9),
    Target(False, False, Kind.GENERATE, 0.95),
    Target(False, False, Kind.PYTHON_HTTP, 1.4),
    Target(False, False, Kind.RUST_HTTP, 1.0, binding=False),
)


@dataclass(frozen=True, slots=True)
class Verdict:
    """One row."""

    what: str
    found: str
    """With the least and the most of all turns."""
    target: str
    verdict: str
    """Met, or missed by how much, or why it is not known."""
    met: bool | None
    """None where nothing can be said, and for what is only aimed at."""


def verdicts(
    throughputs: Sequence[Throughput], first_tokens: Sequence[FirstTokens]
) -> Iterator[Verdict]:
    """One for each target, and one for each kind of prompt whose first tokens were timed."""
    for target in TARGETS:
        yield _of_ratio(target, throughputs)
    for timed in first_tokens:
        yield _of_first_tokens(timed)


def _of_ratio(target: Target, throughputs: Sequence[Throughput]) -> Verdict:
    what = (
        f"{'streaming' if target.streaming else 'unary'}, "
        f"{'with' if target.adapter else 'without'} adapter, {MANY} in flight: "
        f"gateway : {target.base}"
    )
    wanted = f"{'>=' if target.binding else 'aim'} {target.ratio:.2f}"
    for measured in throughputs:
        workload = measured.workload
        case = workload.streaming, bool(workload.adapter), workload.in_flight
        if case == (target.streaming, target.adapter, MANY):
            break
    else:
        return Verdict(what, "", wanted, "not measured", None)
    if target.base not in measured.requests_per_s:
        return Verdict(what, "", wanted, f"not known: no {target.base} here", None)
    ratio = measured.ratio(Kind.GATEWAY, target.base)
    ratios = measured.ratios(Kind.GATEWAY, target.base)
    met = ratio >= target.ratio
    return Verdict(
        what,
        f"{ratio:.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
        wanted,
        "met" if met else f"missed by {target.ratio - ratio:.3f}",
        met if target.binding else None,
    )


def _of_first_tokens(timed: FirstTokens) -> Verdict:
    added_s = timed.added_s(Kind.GATEWAY, Kind.GENERATE)
    by_block = timed.added_by_block_s(Kind.GATEWAY, Kind.GENERATE)
    met = added_s <= MAX_ADDED_S
    return Verdict(
        f"first token, {timed.name}, one in flight: gateway - {Kind.GENERATE}",
        f"{added_s * 1000:.2f} ({min(by_block) * 1000:.2f} to {max(by_block) * 1000:.2f}) ms",
        f"<= {_ms(MAX_ADDED_S)}",
        "met" if met else f"missed by {_ms(added_s - MAX_ADDED_S)}",
        met,
    )


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.2f} ms"
