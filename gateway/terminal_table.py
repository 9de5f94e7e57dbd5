"""Tables, texts and progress bars of the `gateway` command.

Names, findings and answers come from others: no control character of theirs reaches the
terminal, and no bracket is markup.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC

from google.protobuf.timestamp_pb2 import Timestamp
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lora_gateway import UploadProgress

PIPE_WIDTH = 10_000
"""Columns that a table may take where no terminal sets a width: a row stays one line."""


@contextmanager
def bar(text: str, *, in_bytes: bool = False, shown: bool = True) -> Iterator[UploadProgress]:
    """A progress bar on standard error; gives what to call with done and total.

    Nothing is shown where standard error is no terminal.
    """
    # Takes as long to import as all else here, and few commands have a bar.
    from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn

    with Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn() if in_bytes else MofNCompleteColumn(),
        console=Console(stderr=True),
        transient=True,
        # Else what is printed meanwhile would go to standard error too.
        redirect_stdout=False,
        redirect_stderr=False,
        disable=not (shown and sys.stderr.isatty()),
    ) as progress:
        task = progress.add_task(text, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def printable(text: str) -> str:
    """On one line, with a replacement character for each control character."""
    return visible(" ".join(text.split()))


def visible(text: str, kept: str = "") -> str:
    """With a replacement character for each control character that is not in `kept`."""
    return "".join(
        char if char.isprintable() or char in kept else "\N{REPLACEMENT CHARACTER}" for char in text
    )


def table(*columns: str) -> Table:
    """With a header and no lines."""
    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        made.add_column(column, overflow="fold")
    return made


def print_rows(*rows: tuple[str, str]) -> None:
    """Name and value of each row; those without a value are left out."""
    fields = Table.grid(padding=(0, 2))
    fields.add_column(style="bold")
    fields.add_column(overflow="fold")
    for name, value in rows:
        if value:
            fields.add_row(name, printable(value))
    print_table(fields)


def print_table(shown: Table | Text) -> None:
    """Print as it is: what its texts say is no markup."""
    width = None if sys.stdout.isatty() else PIPE_WIDTH
    Console(markup=False, highlight=False, width=width).print(shown)


def size_text(size_bytes: int) -> str:
    """In the largest binary unit that it fills."""
    for power, unit in ((3, "GiB"), (2, "MiB"), (1, "KiB")):
        if size_bytes >= 1024**power:
            return f"{size_bytes / 1024**power:.1f} {unit}"
    return f"{size_bytes} B"


def time_text(time: Timestamp) -> str:
    """In UTC; empty if it is unset."""
    if not time.ByteSize():
        return ""
    return time.ToDatetime(tzinfo=UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def duration_text(duration_s: float) -> str:
    """As `H:MM:SS`."""
    minutes, seconds = divmod(round(duration_s), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
