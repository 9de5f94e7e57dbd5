"""What was measured, for people and as JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tests.bench.comparison import FirstTokens, Throughput
from tests.bench.front_end import Kind
from tests.bench.machine import Machine
from tests.bench.verdict import verdicts


@dataclass(frozen=True, slots=True)
class Report:
    """All of one run."""

    machine: Machine
    model: str
    dtype: str
    workers: int
    """Of the gateway."""
    connections: int
    """To the gateway, for throughput."""
    throughputs: Sequence[Throughput]
    first_tokens: Sequence[FirstTokens]
    absent: Mapping[Kind, str]
    """Sides that are not in it or only in part, and why."""

    def text(self) -> str:
        """The tables, and how they were taken."""
        one, alone = self.throughputs[0], self.first_tokens[0]
        rounds = len(one.requests_per_s[Kind.GATEWAY])
        blocks = alone.blocks_s[Kind.GATEWAY]
        return "\n".join(
            [
                str(self.machine),
                f"model {self.model} in {self.dtype}; the gateway has {self.workers} worker(s)",
                "",
                f"Requests per second, {len(one.workload.prompt)} prompt tokens and "
                f"{one.workload.tokens} generated: median of {rounds} rounds in turns (min to "
                "max), then the gateway's median over it",
                *self._throughput_lines(),
                "",
                f"Time to first token, one in flight: median of {sum(map(len, blocks))} requests "
                f"in {len(blocks)} turns, then what the gateway adds to it",
                *self._first_token_lines(),
                "",
                "Targets: medians (min to max of the turns)",
                *(
                    f"  {row.what:<84}{row.found:<32}{row.target:<12}{row.verdict}".rstrip()
                    for row in verdicts(self.throughputs, self.first_tokens)
                ),
                "",
                "All sides run the same engine options, are up at once and are measured in turns.",
                "Load: h2load, one thread; on HTTP a connection for each in flight, on the gateway "
                f"{self.connections} in all; AsyncLLM is called in its own process.",
                "Every call ended well with all its tokens, as each server counts them.",
                self._answers(),
                *(f"{kind}: {why}" for kind, why in self.absent.items()),
            ]
        )

    def raw(self) -> dict[str, Any]:
        """All figures, for other programs."""
        rows = verdicts(self.throughputs, self.first_tokens)
        medians = [
            {
                "streaming": measured.workload.streaming,
                "adapter": measured.workload.adapter,
                "in_flight": measured.workload.in_flight,
                "requests_per_s": {kind: measured.median(kind) for kind in measured.requests_per_s},
            }
            for measured in self.throughputs
        ]
        return {**asdict(self), "medians": medians, "targets": [asdict(row) for row in rows]}

    def _answers(self) -> str:
        unlike = Counter(kind for measured in self.throughputs for kind in measured.unlike)
        if not unlike:
            return "The answers to one request of each case were the same on all sides."
        cases = ", ".join(f"{kind} in {count}" for kind, count in unlike.items())
        return (
            f"The answers to one request of each of the {len(self.throughputs)} cases were the "
            f"same on all sides, but for {cases}."
        )

    def _throughput_lines(self) -> Iterator[str]:
        groups: dict[tuple[bool, str], list[Throughput]] = {}
        for measured in self.throughputs:
            key = measured.workload.streaming, measured.workload.adapter
            groups.setdefault(key, []).append(measured)
        for (streaming, adapter), columns in groups.items():
            head = f"{'streaming' if streaming else 'unary'}, {'one' if adapter else 'no'} adapter"
            yield _row(head, *(f"{column.workload.in_flight} in flight" for column in columns))
            for kind in Kind:
                if all(kind in column.requests_per_s for column in columns):
                    yield _row(f"  {kind}", *(_rate(column, kind) for column in columns))

    def _first_token_lines(self) -> Iterator[str]:
        yield _row("", *(timed.name for timed in self.first_tokens))
        for kind in Kind:
            if any(kind in timed.blocks_s for timed in self.first_tokens):
                yield _row(f"  {kind}", *(_first_token(t, kind) for t in self.first_tokens))


def _rate(measured: Throughput, kind: Kind) -> str:
    rates = measured.requests_per_s[kind]
    text = f"{_number(measured.median(kind))} ({_number(min(rates))} to {_number(max(rates))})"
    return text if kind == Kind.GATEWAY else f"{text} {measured.ratio(Kind.GATEWAY, kind):.2f}"


def _first_token(timed: FirstTokens, kind: Kind) -> str:
    if kind not in timed.blocks_s:
        return "-"
    text = f"{timed.median_s(kind) * 1000:.2f} ms"
    if kind == Kind.GATEWAY:
        return text
    return f"{text} {timed.added_s(Kind.GATEWAY, kind) * 1000:+.2f}"


def _number(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.1f}"


def _row(name: str, *cells: str) -> str:
    return f"  {name:<26}{''.join(f'{cell:<28}' for cell in cells)}".rstrip()
