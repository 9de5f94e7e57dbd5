"""One prompt, answered by the base model and by a version, next to each other."""

from __future__ import annotations

import asyncio
import json
import sys
from dataclasses import dataclass

import typer
from rich.text import Text

from gateway.terminal_table import print_rows, print_table, table, visible
from lora_gateway import ChatMessage, GatewayClient, GenerateResponse, Publication


@dataclass(frozen=True, slots=True)
class Comparison:
    """Both answers to one prompt."""

    prompt: str
    """What the user says last in it."""
    base: str
    version: str
    name: str
    """Of the version, as `ADAPTER@VERSION`."""


async def compared(
    client: GatewayClient,
    prompt: list[ChatMessage],
    publication: Publication,
    max_tokens: int,
) -> Comparison:
    """Ask both at once, greedily, so that they differ only where the models do.

    Raises:
        GatewayError: one of them could not answer.
    """

    async def answer(adapter: str, version: int | None) -> str:
        response: GenerateResponse = await client.generate(
            prompt, adapter=adapter, version=version, max_tokens=max_tokens, temperature=0
        )
        return response.completions[0].text

    base, version = await asyncio.gather(
        answer("", None), answer(publication.adapter, publication.version)
    )
    name = f"{publication.adapter}@{publication.version}"
    return Comparison(prompt[-1].content, base, version, name)


def print_comparison(comparison: Comparison, as_json: bool) -> None:
    """Two columns at a terminal; lines in a pipe; an object for programs."""
    if as_json:
        fields = {name: getattr(comparison, name) for name in Comparison.__slots__}
        typer.echo(json.dumps({"comparison": fields}, ensure_ascii=False))
    elif sys.stdout.isatty():
        typer.echo(f"> {visible(comparison.prompt, kept=chr(10))}")
        shown = table("base model", comparison.name)
        for column in shown.columns:
            column.ratio = 1
        shown.expand = True
        shown.add_row(
            Text(visible(comparison.base, kept="\n")),
            Text(visible(comparison.version, kept="\n")),
        )
        print_table(shown)
    else:
        print_rows(
            ("prompt", comparison.prompt),
            ("base model", comparison.base),
            (comparison.name, comparison.version),
        )
