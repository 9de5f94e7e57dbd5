"""What many adapters were found to cost, for people."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

MAX_ADDED_START_S = 3.0
"""Target: what the adapters add to a start."""
MAX_PAGE_S = 0.020
"""Target: one page of ListAdapters, through a worker."""
MAX_ADAPTER_BYTES = 2048.0
"""Target: memory of a worker for each adapter."""
MAX_RESOLVE_SHARE = 0.01
"""Target: resolving a name, of a worker's work for the smallest request."""
PAGE_ADAPTERS = 100


@dataclass(frozen=True, slots=True)
class Start:
    """One gateway that was started, and its only worker before it had any call."""

    serving_s: float
    """From the command to the line that says SERVING."""
    processor_s: float
    """Of all its processes until then."""
    worker_uss_bytes: int
    """Memory that the end of the process would free."""


@dataclass(frozen=True, slots=True)
class Reading:
    """What a start does for each adapter, alone in one process."""

    registry_s: float
    """To open the file, which is checked for damage."""
    ledger_s: float
    """To read all adapters into the host's view."""
    orders_s: float
    """To carry the view to one worker."""

    @property
    def all_s(self) -> float:
        """All of it, with one worker."""
        return self.registry_s + self.ledger_s + self.orders_s


@dataclass(frozen=True, slots=True)
class Load:
    """Requests for one adapter, each for one token, many in flight at one worker."""

    requests_per_s: float
    worker_cpu_s: float
    """Processor time of the worker for each request."""


@dataclass(frozen=True, slots=True)
class AdaptersReport:
    """All of one run. Each sequence has an element for each start, or each call."""

    machine: str
    load_average_after: float
    adapters: int
    writing_s: float
    empty_starts: Sequence[Start]
    full_starts: Sequence[Start]
    empty_reading: Reading
    full_reading: Reading
    pages_s: Sequence[float]
    loads: Sequence[Load]
    resolves_s: Sequence[float]
    """Seconds a call, of each block of calls."""

    def text(self) -> str:
        """The figures, each against its target."""
        adapters = f"{self.adapters:,}"
        return "\n".join(
            (
                f"{self.machine}; load average {self.load_average_after:.1f} after",
                f"{adapters} adapters, each with one READY version and a split: written through "
                f"the registry in {self.writing_s:.0f} s",
                f"medians (min to max) of {len(self.empty_starts)} starts with none and "
                f"{len(self.full_starts)} with {adapters}, in turns, one worker each",
                "",
                _row("", "none", adapters, "the difference", "target"),
                self._start_row(),
                self._processor_row(),
                self._reading_row(),
                self._memory_row(),
                "",
                *self._calls(),
            )
        )

    def _start_row(self) -> str:
        none_s = [start.serving_s for start in self.empty_starts]
        many_s = [start.serving_s for start in self.full_starts]
        return _added_row("start to SERVING", none_s, many_s)

    def _processor_row(self) -> str:
        none_s = [start.processor_s for start in self.empty_starts]
        many_s = [start.processor_s for start in self.full_starts]
        return _added_row("  processor time until then", none_s, many_s)

    def _reading_row(self) -> str:
        none, many = self.empty_reading, self.full_reading
        added_s = many.all_s - none.all_s
        return _row(
            "  what a start reads, alone",
            f"{none.all_s:.3f} s",
            f"{many.all_s:.3f} s",
            f"{added_s:+.3f} s",
            f"{_start_verdict(added_s)} by itself (file {many.registry_s:.3f}, "
            f"view {many.ledger_s:.3f}, worker {many.orders_s:.3f})",
        )

    def _memory_row(self) -> str:
        none_bytes = [start.worker_uss_bytes for start in self.empty_starts]
        many_bytes = [start.worker_uss_bytes for start in self.full_starts]
        grown_bytes = (median(many_bytes) - median(none_bytes)) / self.adapters
        return _row(
            "memory of a worker (USS)",
            _mebibytes(none_bytes),
            _mebibytes(many_bytes),
            f"{grown_bytes:+,.0f} B an adapter",
            _verdict(grown_bytes, MAX_ADAPTER_BYTES, lambda over: f"{over:,.0f} B"),
        )

    def _calls(self) -> Sequence[str]:
        page_s, resolve_s = median(self.pages_s), median(self.resolves_s)
        cpu_s = median(load.worker_cpu_s for load in self.loads)
        share = resolve_s / cpu_s
        page_verdict = _verdict(page_s, MAX_PAGE_S, lambda over: f"{over * 1e3:.1f} ms")
        share_verdict = _verdict(share, MAX_RESOLVE_SHARE, lambda over: f"{over:.2%}")
        return (
            f"ListAdapters, a page of {PAGE_ADAPTERS}: {page_s * 1e3:.1f} ms, median of "
            f"{len(self.pages_s)} calls through a worker, over all pages "
            f"({min(self.pages_s) * 1e3:.1f} to {max(self.pages_s) * 1e3:.1f}); "
            f"target {MAX_PAGE_S * 1e3:.0f} ms: {page_verdict}",
            f"resolve, two arms: {resolve_s * 1e6:.2f} us a call; a request for one token costs "
            f"the worker {cpu_s * 1e6:.0f} us of processor time "
            f"({median(load.requests_per_s for load in self.loads):.0f} requests/s): "
            f"{share:.2%}; target {MAX_RESOLVE_SHARE:.0%}: {share_verdict}",
        )


def _verdict(value: float, limit: float, in_words: Callable[[float], str]) -> str:
    return "met" if value < limit else f"missed by {in_words(value - limit)}"


def _added_row(name: str, none_s: Sequence[float], many_s: Sequence[float]) -> str:
    """What is added to a start. Starts that differ by more than the target, among those that
    should be equal, cannot tell whether it is met."""
    added_s = median(many_s) - median(none_s)
    apart_s = max(max(none_s) - min(none_s), max(many_s) - min(many_s))
    return _row(
        name,
        _seconds(none_s),
        _seconds(many_s),
        f"{added_s:+.2f} s",
        _start_verdict(added_s)
        if apart_s < MAX_ADDED_START_S
        else f"open: equal starts are up to {apart_s:.1f} s apart",
    )


def _start_verdict(added_s: float) -> str:
    return _verdict(added_s, MAX_ADDED_START_S, lambda over: f"{over:.2f} s")


def _seconds(times_s: Sequence[float]) -> str:
    return f"{median(times_s):.1f} s ({min(times_s):.1f} to {max(times_s):.1f})"


def _mebibytes(sizes_bytes: Sequence[int]) -> str:
    low, middle, high = (
        size / 2**20 for size in (min(sizes_bytes), median(sizes_bytes), max(sizes_bytes))
    )
    return f"{middle:.1f} MiB ({low:.1f} to {high:.1f})"


def _row(*cells: str) -> str:
    name, none, many, difference, target = cells
    return f"  {name:<32}{none:<30}{many:<30}{difference:<20}{target}".rstrip()
