"""What `gateway quarantine` shows.

Names come from others: no control character of theirs reaches the terminal, and no bracket is
markup.
"""

from __future__ import annotations

import typer

from gateway.terminal_table import print_table, printable, table, time_text
from lora_gateway.v1.admin_pb2 import ListQuarantineResponse


def print_quarantine(held: ListQuarantineResponse) -> None:
    """A table, one request or version a row, and how many are suspected."""
    shown = table("subject", "kind", "until")
    for request in held.requests:
        shown.add_row(printable(request.fingerprint), "request", time_text(request.until_time))
    for version in held.versions:
        name = f"{version.tenant}/{version.adapter}@{version.version}"
        shown.add_row(printable(name), "adapter version", time_text(version.until_time))
    if shown.row_count:
        print_table(shown)
    else:
        typer.echo("nothing is in quarantine")
    if held.suspect_count:
        suspects = f"{held.suspect_count} request{'s' if held.suspect_count > 1 else ''}"
        typer.echo(f"{suspects} suspected after one crash, and served")
