"""What the `gateway` command shows of answers, models and errors.

Standard output holds the answer alone; everything about it goes to standard error.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import typer
from google.protobuf.json_format import MessageToJson
from google.protobuf.message import Message
from rich.console import Console
from rich.table import Table

from lora_gateway import (
    FinishReason,
    GatewayError,
    GenerationDelta,
    GenerationEvent,
    GenerationFinished,
    GenerationStarted,
    GenerationStream,
    ServedBy,
    Timings,
    Unavailable,
    Usage,
)
from lora_gateway.v1.inference_pb2 import GenerateStreamResponse


async def print_text(stream: GenerationStream, printed: list[str]) -> None:
    """Print the text as it comes, and add it to `printed`, which outlives a failure."""
    try:
        async for text in stream.text():
            printed.append(text)
            typer.echo(text, nl=False)
    finally:
        if printed:
            typer.echo()


def tell(error: GatewayError, target: str) -> None:
    """One line, one more for each violation, and what to do about it where that is known."""
    typer.echo(f"error: {' '.join(str(error).split())}", err=True)
    for violation in error.violations:
        typer.echo(f"  {violation.field}: {violation.description}", err=True)
    if error.retry_delay_s is not None:
        typer.echo(f"  retry in {error.retry_delay_s:g} s", err=True)
    elif isinstance(error, Unavailable) and not error.reason_name:
        typer.echo(f"  is the gateway running at {target}? make serve", err=True)
    if error.request_id:
        typer.echo(f"  request id in the server's log: {error.request_id}", err=True)


def summarize(
    served_by: ServedBy, finish_reason: FinishReason.ValueType, usage: Usage, timings: Timings
) -> None:
    """Tell a person who answered and how fast; standard output stays the answer alone."""
    if not sys.stderr.isatty():
        return
    who = f"{served_by.adapter}@{served_by.version}" if served_by.adapter else "base model"
    reason = FinishReason.DESCRIPTOR.values_by_number.get(finish_reason)
    ending = reason.name.removeprefix("FINISH_REASON_").lower() if reason else str(finish_reason)
    typer.secho(
        f"{who} on {served_by.shard}: {usage.prompt_tokens} + {usage.completion_tokens} tokens, "
        f"{ending}, first after {timings.time_to_first_token_ms:.0f} ms, "
        f"all in {timings.total_ms:.0f} ms",
        err=True,
        dim=True,
    )


def enveloped(event: GenerationEvent) -> GenerateStreamResponse:
    """The event as it was on the wire, so that JSON says which kind it is."""
    match event:
        case GenerationStarted():
            return GenerateStreamResponse(started=event)
        case GenerationDelta():
            return GenerateStreamResponse(delta=event)
        case GenerationFinished():
            return GenerateStreamResponse(finished=event)


def as_json(message: Message, indent: int | None = 2) -> str:
    """JSON with names as in the .proto files, and zeros too: an absent key is a trap."""
    return MessageToJson(
        message,
        indent=indent,
        preserving_proto_field_name=True,
        always_print_fields_with_no_presence=True,
        ensure_ascii=False,
    )


def print_fields(message: Message) -> None:
    """Print a table of the fields, those of nested messages in place."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for path, value in _fields(message):
        table.add_row(path, value)
    # Values are a user's text: brackets in them are no markup.
    Console(markup=False, highlight=False).print(table)


def _fields(message: Message, prefix: str = "") -> Iterator[tuple[str, str]]:
    for field in message.DESCRIPTOR.fields:
        value = getattr(message, field.name)
        if isinstance(value, Message):
            yield from _fields(value, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", str(value)
