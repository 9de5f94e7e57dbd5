"""What `gateway datasets` and `gateway train` show of datasets and their tokens."""

from __future__ import annotations

import sys
from collections.abc import Iterable

import typer
from rich.text import Text

from gateway.terminal import as_json
from gateway.terminal_table import (
    print_rows,
    print_table,
    printable,
    size_text,
    table,
    time_text,
    visible,
)
from lora_gateway import (
    Dataset,
    DatasetFormat,
    DatasetReport,
    LineIssueCode,
    PreviewTokensResponse,
    TokenStatistics,
)

HISTOGRAM_COLUMNS = 40
"""Of the longest bar."""
LINES_SHOWN = 20
"""Of lines that are only numbers; --json has them all."""


def print_dataset(dataset: Dataset, json: bool) -> None:
    """The dataset, as a table of fields or as JSON."""
    if json:
        typer.echo(as_json(dataset))
        return
    print_rows(
        ("dataset", dataset.name),
        ("format", format_text(dataset.format)),
        ("size", size_text(dataset.size_bytes)),
        ("sha256", dataset.sha256),
        ("create_time", time_text(dataset.create_time)),
    )


def print_datasets(datasets: Iterable[Dataset]) -> None:
    """A table, one dataset a row."""
    shown = table("dataset", "format", "size", "created", "sha256")
    for dataset in datasets:
        shown.add_row(
            printable(dataset.name),
            format_text(dataset.format),
            size_text(dataset.size_bytes),
            time_text(dataset.create_time),
            printable(dataset.sha256),
        )
    print_table(shown)


def print_report(report: DatasetReport) -> None:
    """Counts, bad lines, lengths, and why it is not valid where it is not."""
    counts = ", ".join(f"{printable(code)} {n}" for code, n in sorted(report.issue_counts.items()))
    print_rows(
        ("valid", "yes" if report.valid else "no"),
        ("format", format_text(report.format)),
        ("lines", f"{report.total_lines:,}"),
        ("rows", f"{report.rows:,}"),
        ("bad lines", f"{report.bad_lines:,}{f' ({counts})' if counts else ''}"),
        ("too long", _with_lines(report.overlength_rows, report.overlength_lines)),
        ("truncated", _count(report.truncated_rows)),
        ("duplicates", _with_lines(report.duplicate_rows, report.duplicate_lines)),
        ("nothing to train on", _count(report.untrained_rows)),
        ("tokens", _tokens(report.tokens)),
        ("tokens a row", _lengths(report.tokens)),
    )
    _print_histogram(report.tokens)
    if report.issues:
        shown = table("line", "code", "field", "what is wrong")
        for issue in report.issues:
            shown.add_row(
                str(issue.line),
                _code(issue.code),
                printable(issue.field),
                printable(issue.message),
            )
        print_table(shown)
    if report.bad_lines > len(report.issues):
        typer.echo(f"{report.bad_lines - len(report.issues):,} more bad lines are not shown")
    for reason in report.reasons:
        typer.echo(f"not valid: {printable(reason)}")


def print_preview(preview: PreviewTokensResponse) -> None:
    """The row's text, green where it is trained on; in a pipe, one token a line."""
    if sys.stdout.isatty():
        text = Text()
        for token in preview.tokens:
            text.append(visible(token.text, kept="\n"), "bold green" if token.trained else "dim")
        print_table(text)
    else:
        shown = table("id", "trained", "text")
        for token in preview.tokens:
            shown.add_row(str(token.id), "yes" if token.trained else "no", _quoted(token.text))
        print_table(shown)
    trained = sum(token.trained for token in preview.tokens)
    typer.echo(f"{len(preview.tokens)} tokens, {trained} of them trained on")
    if not preview.kept or preview.reason:
        state = "kept" if preview.kept else "left out"
        typer.echo(f"{state}: {printable(preview.reason)}")
    typer.echo(
        "the server renders the same ids"
        if preview.matches_serving
        else f"no match with the server: {printable(preview.mismatch)}"
    )


def format_text(format: DatasetFormat.ValueType) -> str:
    """As it is typed."""
    known = DatasetFormat.DESCRIPTOR.values_by_number.get(format)
    if not format:
        return "detected when it is read"
    return known.name.removeprefix("DATASET_FORMAT_").lower() if known else str(format)


def _print_histogram(tokens: TokenStatistics) -> None:
    if not tokens.histogram:
        return
    most = max(bucket.rows for bucket in tokens.histogram)
    shown = table("up to", "rows", "")
    for bucket in tokens.histogram:
        length = round(bucket.rows / most * HISTOGRAM_COLUMNS) if most else 0
        # A row that is there is seen.
        shown.add_row(f"{bucket.up_to:,}", f"{bucket.rows:,}", "█" * max(length, 1))
    print_table(shown)


def _tokens(tokens: TokenStatistics) -> str:
    if not tokens.total:
        return ""
    share = tokens.trained / tokens.total
    return f"{tokens.total:,}, {tokens.trained:,} of them trained on ({share:.0%})"


def _lengths(tokens: TokenStatistics) -> str:
    if not tokens.total:
        return ""
    return f"mean {tokens.mean:.1f}, p50 {tokens.p50}, p95 {tokens.p95}, max {tokens.max}"


def _count(count: int) -> str:
    return f"{count:,}" if count else ""


def _with_lines(count: int, lines: Iterable[int]) -> str:
    if not count:
        return ""
    named = list(lines)[:LINES_SHOWN]
    more = ", ..." if count > len(named) else ""
    return f"{count:,} (lines {', '.join(map(str, named))}{more})"


def _code(code: LineIssueCode.ValueType) -> str:
    known = LineIssueCode.DESCRIPTOR.values_by_number.get(code)
    return known.name.removeprefix("LINE_ISSUE_CODE_") if known else str(code)


def _quoted(text: str) -> str:
    """Blanks and line ends can be seen, as in Python."""
    return visible(repr(text)[1:-1])
