"""What the edge was found to bear, for people and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from tests.bench.machine import Machine

MIN_SPEED_UP = 3.5
"""Target: streams a second of four workers on four fake shards, over those of one on one."""
MANY_WORKERS = 4
PROCESSORS_NEEDED = 2 * MANY_WORKERS
"""With fewer, workers and load wait for each other."""
MAX_STREAM_BYTES = 30 * 1024
"""Target: memory of a worker for each open stream."""


@dataclass(frozen=True, slots=True)
class EdgeRound:
    """One load on some workers, over a stretch of time in the middle of it."""

    streams_each: Sequence[int]
    """That ended in it, of each worker."""
    tokens: int
    messages: int
    seconds: float
    processor_s: float
    """Of all workers."""

    @property
    def streams_per_s(self) -> float:
        """Of all workers."""
        return sum(self.streams_each) / self.seconds

    @property
    def tokens_per_s(self) -> float:
        """Of all workers."""
        return self.tokens / self.seconds

    @property
    def messages_per_s(self) -> float:
        """Of all workers."""
        return self.messages / self.seconds

    @property
    def processor_us(self) -> float:
        """Processor time of a worker for each message, in microseconds."""
        return self.processor_s / self.messages * 1e6

    @property
    def spread(self) -> float:
        """Streams of the least busy worker, over those of the busiest."""
        return min(self.streams_each) / max(self.streams_each)


@dataclass(frozen=True, slots=True)
class Point:
    """The rounds of so many workers on as many shards."""

    workers: int
    rounds: Sequence[EdgeRound]

    @property
    def streams_per_s(self) -> float:
        """Median of the rounds."""
        return median(one.streams_per_s for one in self.rounds)


@dataclass(frozen=True, slots=True)
class Memory:
    """What open streams took."""

    streams: int
    """Open at once; all of them ended with OK."""
    connections: int
    before_bytes: int
    open_bytes: int
    """The most while all were open."""

    @property
    def stream_bytes(self) -> float:
        """For each stream, its share of a connection included."""
        return (self.open_bytes - self.before_bytes) / self.streams


@dataclass(frozen=True, slots=True)
class EdgeReport:
    """All of one run. What was not measured is empty, or None."""

    machine: Machine
    method: str
    tokens: int
    in_flight_each: int
    connections_each: int
    step_s: float
    """In which a shard makes a token for each of its calls."""
    fake_us: float
    """Processor time of a fake shard for each output, of that of the workers."""
    points: Sequence[Point]
    memory: Memory | None

    def text(self) -> str:
        """The tables."""
        lines = [str(self.machine)]
        if self.points:
            lines += ["", *self._curve(), self.speed_up_verdict()]
        if self.memory is not None:
            lines += ["", *_memory_lines(self.memory)]
        return "\n".join(lines)

    def raw(self) -> dict[str, Any]:
        """All figures, for other programs."""
        return asdict(self)

    def speed_up_verdict(self) -> str:
        """Whether several workers stream as much more as they should."""
        by_workers = {point.workers: point.streams_per_s for point in self.points}
        row = f"  {MANY_WORKERS} workers on {MANY_WORKERS} fake shards : 1 on 1, target >= "
        row += f"{MIN_SPEED_UP:g}: "
        if not {1, MANY_WORKERS} <= by_workers.keys():
            return row + "not measured"
        ratio = by_workers[MANY_WORKERS] / by_workers[1]
        if self.machine.cores < PROCESSORS_NEEDED:
            return f"{row}{ratio:.2f}, needs {PROCESSORS_NEEDED} processors"
        met = "met" if ratio >= MIN_SPEED_UP else f"missed by {MIN_SPEED_UP - ratio:.2f}"
        return f"{row}{ratio:.2f}, {met}"

    def _curve(self) -> list[str]:
        one = self.points[0]
        return [
            f"{self.method} over fake shards with a step every {self.step_s * 1000:g} ms, "
            f"{self.tokens} tokens each, {self.in_flight_each} in flight on "
            f"{self.connections_each} connections for each worker: "
            f"median of {len(one.rounds)} rounds of {one.rounds[0].seconds:.0f} s",
            _row("workers", "calls/s", "tokens/s", "messages/s", "us each", "of one", "even"),
            *(self._point_row(point) for point in self.points),
            f"  us each: processor time of the workers for a message, {self.fake_us:.1f} us of it "
            "the fake shard's.",
            "  of one: calls/s over those of the first row, medians of the rounds (least to most).",
            "  even: calls of the least busy worker over those of the busiest.",
        ]

    def _point_row(self, point: Point) -> str:
        base = self.points[0].streams_per_s
        ratios = [one.streams_per_s / base for one in point.rounds]
        return _row(
            f"{point.workers}",
            f"{point.streams_per_s:,.0f}",
            f"{median(one.tokens_per_s for one in point.rounds):,.0f}",
            f"{median(one.messages_per_s for one in point.rounds):,.0f}",
            f"{median(one.processor_us for one in point.rounds):.1f}",
            f"{point.streams_per_s / base:.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
            f"{median(one.spread for one in point.rounds):.2f}",
        )


def _memory_lines(memory: Memory) -> list[str]:
    over = memory.stream_bytes - MAX_STREAM_BYTES
    verdict = "met" if over <= 0 else f"missed by {over / 1024:.1f} KiB"
    return [
        f"{memory.streams:,} open streams on {memory.connections} connections, one worker; all "
        "ended with OK",
        f"  worker: {memory.before_bytes / 2**20:.0f} MiB before, {memory.open_bytes / 2**20:.0f} "
        "MiB with them",
        f"  for each, target <= {MAX_STREAM_BYTES / 1024:.0f} KiB: "
        f"{memory.stream_bytes / 1024:.1f} KiB, {verdict}",
    ]


def _row(*cells: str) -> str:
    name, calls, tokens, messages, cost, ratio, even = cells
    return f"  {name:<9}{calls:>9}{tokens:>11}{messages:>12}{cost:>9}   {ratio:<22}{even:>6}"
