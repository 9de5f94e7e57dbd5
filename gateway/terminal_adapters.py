"""What `gateway adapters` shows of adapters, versions, comparisons and changes.

Names, findings and answers come from others: no control character of theirs reaches the
terminal, and no bracket is markup.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import typer
from rich.text import Text

from gateway.terminal import as_json
from gateway.terminal_table import print_rows, print_table, printable, size_text, table, time_text
from lora_gateway import (
    Adapter,
    AdapterEvent,
    AdapterVersion,
    ArmReport,
    CompareVersionsResponse,
    EvaluationResult,
    EvaluationSummary,
    EventKind,
    Scorer,
    TrafficGuard,
    TrafficSplit,
    ValidateAdapterResponse,
    VersionState,
)

SERVER_ERRORS = ("INTERNAL", "UNAVAILABLE", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED", "UNKNOWN")
"""The codes that count as errors of the server; `TrafficGuard` in the contract."""
MEASURES = (
    "error_ratio",
    "ttft_ms.p50",
    "ttft_ms.p95",
    "inter_token_ms.p50",
    "inter_token_ms.p95",
    "total_ms.p50",
    "total_ms.p95",
    "completion_tokens.mean",
    "feedback.mean",
)
"""In the order of the table; named as `ArmDifference.measure`."""
SIGNIFICANT = "* the confidence interval of the difference leaves out 0"


def print_validation(validation: ValidateAdapterResponse) -> None:
    """The facts of a valid adapter, or the findings of another, one a line."""
    if not validation.valid:
        for finding in validation.findings:
            typer.echo(printable(finding))
        return
    facts = validation.facts
    print_rows(
        ("rank", str(facts.rank)),
        ("target_modules", ", ".join(facts.target_modules)),
        ("modules", str(facts.module_count)),
        ("parameters", f"{facts.parameter_count:,}"),
        ("dtype", facts.dtype),
        ("size", size_text(facts.size_bytes)),
        ("weights_sha256", facts.weights_sha256),
        ("digest", facts.digest),
    )


def print_adapter(adapter: Adapter, json: bool) -> None:
    """The adapter with its split, as a table of fields or as JSON."""
    if json:
        typer.echo(as_json(adapter))
        return
    print_rows(
        ("adapter", adapter.adapter),
        ("traffic", _splits(adapter.splits) or "none"),
        ("guard", _guard(adapter.guard) if adapter.HasField("guard") else "none"),
        ("latest_version", str(adapter.latest_version)),
        ("etag", adapter.etag),
        ("create_time", time_text(adapter.create_time)),
        ("traffic_time", time_text(adapter.traffic_time)),
    )


def print_adapters(adapters: Iterable[Adapter]) -> None:
    """A table, one adapter a row."""
    shown = table("adapter", "traffic", "latest", "guard", "traffic since", "etag")
    for adapter in adapters:
        shown.add_row(
            adapter.adapter,
            _splits(adapter.splits) or "none",
            str(adapter.latest_version),
            f"version {adapter.guard.version}" if adapter.HasField("guard") else "none",
            time_text(adapter.traffic_time),
            adapter.etag,
        )
    print_table(shown)


def print_version(version: AdapterVersion, json: bool) -> None:
    """The version, as a table of fields or as JSON."""
    if json:
        typer.echo(as_json(version))
        return
    residency = [f"{held.shard} ({held.load_duration_ms:.0f} ms)" for held in version.residency]
    print_rows(
        ("version", f"{version.adapter}@{version.version}"),
        ("state", _state(version.state)),
        ("weight", str(version.weight)),
        ("resident", ", ".join(residency) or "nowhere"),
        ("rank", str(version.rank)),
        ("target_modules", ", ".join(version.target_modules)),
        ("size", size_text(version.size_bytes)),
        ("source", version.source_uri),
        ("labels", ", ".join(f"{key}={value}" for key, value in sorted(version.labels.items()))),
        ("weights_sha256", version.weights_sha256),
        ("digest", version.digest),
        ("create_time", time_text(version.create_time)),
        ("update_time", time_text(version.update_time)),
        *(("finding", finding) for finding in version.findings),
    )


def print_versions(versions: Iterable[AdapterVersion]) -> None:
    """A table, one version a row."""
    shown = table("version", "state", "weight", "rank", "size", "resident", "created", "source")
    for version in versions:
        shown.add_row(
            str(version.version),
            _state(version.state),
            str(version.weight),
            str(version.rank),
            size_text(version.size_bytes),
            ", ".join(held.shard for held in version.residency),
            time_text(version.create_time),
            printable(version.source_uri),
        )
    print_table(shown)


def print_comparison(comparison: CompareVersionsResponse) -> None:
    """A table with a column for each arm and a row for each measure."""
    if not comparison.arms:
        typer.echo("no version has answered a request yet")
        return
    baseline, *others = (f"version {arm.version}" for arm in comparison.arms)
    shown = table("", f"{baseline} (baseline)", *others)
    shown.add_row("requests", *(str(arm.request_count) for arm in comparison.arms))
    shown.add_row("codes", *(_counts(arm.codes) for arm in comparison.arms))
    shown.add_row("finish_reasons", *(_counts(arm.finish_reasons) for arm in comparison.arms))
    differences = {(found.version, found.measure): found for found in comparison.differences}
    for measure in MEASURES:
        cells = [Text(measure)]
        for arm in comparison.arms:
            cell = Text(_measured(arm, measure))
            if found := differences.get((arm.version, measure)):
                interval = (found.difference, found.low, found.high, found.significant)
                cell.append_text(_difference(*interval))
            cells.append(cell)
        shown.add_row(*cells)
    print_table(shown)
    if any(found.significant for found in comparison.differences):
        typer.echo(SIGNIFICANT)


def print_summary(summary: EvaluationSummary) -> None:
    """A table with a row for each version and scorer."""
    shown = table("version", "scorer", "mean", "95 % interval", "examples", "difference")
    differences = {(found.version, found.scorer): found for found in summary.differences}
    for score in summary.scores:
        difference = Text()
        if found := differences.get((score.version, score.scorer)):
            difference = _difference(found.difference, found.low, found.high, found.significant)
        shown.add_row(
            _arm(score.version),
            _scorer(score.scorer),
            f"{score.mean:.4g}",
            f"{score.low:.4g} to {score.high:.4g}",
            str(score.count),
            difference,
        )
    print_table(shown)
    if summary.failed_count:
        typer.echo(f"failed answers: {summary.failed_count} (--results tells why)")
    if any(found.significant for found in summary.differences):
        typer.echo(SIGNIFICANT)


def result_line(result: EvaluationResult) -> str:
    """One scored answer, or why there is none."""
    scores = " ".join(f"{_scorer(score.scorer)}={score.value:.4g}" for score in result.scores)
    outcome = f"error: {result.error}" if result.error else f"{scores}: {result.answer}"
    return printable(f"#{result.example} version {_arm(result.version)}: {outcome}")


def event_line(event: AdapterEvent) -> str:
    """One change: when, what, to which version, by whom and why."""
    kind = EventKind.DESCRIPTOR.values_by_number.get(event.kind)
    parts = [
        f"{event.sequence} {time_text(event.time)}",
        f"{event.adapter}@{event.version}" if event.version else event.adapter,
        kind.name.removeprefix("EVENT_KIND_").lower() if kind else f"kind_{event.kind}",
        _splits(event.splits),
        f"by {event.actor}",
        f"({event.reason})" if event.reason else "",
    ]
    return printable(" ".join(filter(None, parts)))


def _splits(splits: Sequence[TrafficSplit]) -> str:
    return " ".join(f"{arm.version}={arm.weight}" for arm in splits)


def _guard(guard: TrafficGuard) -> str:
    limits = [
        f"{name} {getattr(guard, name):g}"
        for name in ("max_error_ratio", "max_ttft_p95_ms", "max_total_p95_ms", "min_requests")
        if guard.HasField(name)
    ]
    return ", ".join([f"version {guard.version}", *limits])


def _difference(difference: float, low: float, high: float, significant: bool) -> Text:
    mark = "*" if significant else ""
    text = f" {difference:+.3g}{mark} [{low:.3g}, {high:.3g}]"
    return Text(text, style="bold" if significant else "dim")


def _measured(arm: ArmReport, measure: str) -> str:
    if measure == "error_ratio":
        errors = sum(arm.codes[code] for code in SERVER_ERRORS if code in arm.codes)
        return f"{errors / arm.request_count:.4g}" if arm.request_count else "-"
    name, _, statistic = measure.partition(".")
    found = getattr(arm, name)
    return f"{getattr(found, statistic):.4g}" if found.count else "-"


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{printable(name)} {count}" for name, count in sorted(counts.items()))


def _arm(version: int) -> str:
    return str(version) if version else "base"


def _state(state: VersionState.ValueType) -> str:
    known = VersionState.DESCRIPTOR.values_by_number.get(state)
    return known.name.removeprefix("VERSION_STATE_") if known else str(state)


def _scorer(scorer: Scorer.ValueType) -> str:
    known = Scorer.DESCRIPTOR.values_by_number.get(scorer)
    return known.name.removeprefix("SCORER_").lower() if known else str(scorer)
