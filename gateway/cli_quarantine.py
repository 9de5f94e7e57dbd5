"""`gateway quarantine`: look at what is refused because engines crashed on it, and release it."""

from __future__ import annotations

import re
from typing import Annotated

import typer

from gateway.cli_options import Json, connected
from gateway.terminal import as_json
from gateway.terminal_quarantine import print_quarantine
from lora_gateway import GatewayClient
from lora_gateway.v1.admin_pb2 import LiftQuarantineResponse, VersionName

app = typer.Typer(
    help="Look after requests and versions that crash engines, on the gateway's own machine.",
    no_args_is_help=True,
)

_VERSION = re.compile(r"(?:(?P<tenant>[^/@]+)/)?(?P<adapter>[^/@]+)@(?P<version>[0-9]+)")


@app.command("list")
@connected
async def list_quarantine(client: GatewayClient, json: Json = False) -> None:
    """List what is refused, and until when."""
    held = await client.admin.list_quarantine()
    if json:
        typer.echo(as_json(held))
    else:
        print_quarantine(held)


@app.command()
@connected
async def lift(
    client: GatewayClient,
    subject: Annotated[
        str,
        typer.Argument(
            metavar="SUBJECT",
            help="As the list has it: the fingerprint of a request, or ADAPTER@VERSION.",
        ),
    ],
    json: Json = False,
) -> None:
    """Release a request or a version at once, once what crashed on it is corrected."""
    lifted = await client.admin.lift_quarantine(_subject(subject))
    if json:
        typer.echo(as_json(LiftQuarantineResponse(lifted=lifted)))
    if not lifted:
        typer.echo(f"error: {subject} is not in quarantine", err=True)
        raise typer.Exit(1)
    if not json:
        typer.echo(f"{subject} is released")


def _subject(text: str) -> str | VersionName:
    """What is named. The gateway checks fingerprints and names."""
    if "@" not in text:
        return text
    found = _VERSION.fullmatch(text)
    if found is None:
        raise typer.BadParameter(f"{text!r} is no ADAPTER@VERSION", param_hint="SUBJECT")
    return VersionName(
        tenant=found["tenant"] or "", adapter=found["adapter"], version=int(found["version"])
    )
