"""`gateway adapters`: take adapters in, look at them, load and delete them, watch them."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from gateway.cli_options import Json, Labels, connected, label_map
from gateway.cli_traffic import app as traffic_app
from gateway.terminal import as_json
from gateway.terminal_adapters import (
    event_line,
    print_adapter,
    print_adapters,
    print_validation,
    print_version,
    print_versions,
)
from gateway.terminal_table import bar
from lora_gateway import GatewayClient
from lora_gateway.v1.adapters_pb2 import ListAdaptersResponse, ListAdapterVersionsResponse

app = typer.Typer(
    help="Manage adapters: versions, traffic, comparisons, all without a restart.",
    no_args_is_help=True,
)

Name = Annotated[str, typer.Argument(metavar="NAME", help="The adapter.")]
Number = Annotated[int, typer.Argument(metavar="VERSION", min=1, help="The version's number.")]
Source = Annotated[
    str,
    typer.Argument(
        metavar="SOURCE", help="Folder on the gateway's machine, or URL, that it may read."
    ),
]
Sha256 = Annotated[str, typer.Option(help="What the weights must have, as sha256sum prints it.")]
Wait = Annotated[
    bool, typer.Option("--wait/--no-wait", help="Until the version is READY or was refused.")
]
NoTraffic = Annotated[
    bool, typer.Option("--no-traffic", help="Give also a first version no traffic by itself.")
]


@app.command()
@connected
async def validate(
    client: GatewayClient, source: Source, sha256: Sha256 = "", json: Json = False
) -> None:
    """Check an adapter and keep nothing. Exits with 1 if it would be refused."""
    validation = await client.adapters.validate(_source_uri(source), expected_sha256=sha256)
    if json:
        typer.echo(as_json(validation))
    else:
        print_validation(validation)
    if not validation.valid:
        raise typer.Exit(1)


@app.command()
@connected
async def create(
    client: GatewayClient,
    name: Name,
    source: Source,
    wait: Wait = True,
    sha256: Sha256 = "",
    label: Labels = None,
    no_traffic: NoTraffic = False,
    request_id: Annotated[
        str | None, typer.Option(help="Calls with the same id make one version.")
    ] = None,
    json: Json = False,
) -> None:
    """Take in an adapter that the gateway can read, as the next version of its name."""
    version = await client.adapters.create(
        name,
        _source_uri(source),
        expected_sha256=sha256,
        labels=label_map(label),
        wait=wait,
        no_traffic=no_traffic,
        request_id=request_id,
    )
    print_version(version, json)


@app.command()
@connected
async def upload(
    client: GatewayClient,
    name: Name,
    folder: Annotated[
        Path, typer.Argument(exists=True, file_okay=False, help="The adapter's folder, here.")
    ],
    wait: Wait = True,
    label: Labels = None,
    no_traffic: NoTraffic = False,
    upload_id: Annotated[
        str | None, typer.Option(help="Without: made of name and content, the same every time.")
    ] = None,
    json: Json = False,
) -> None:
    """Send an adapter from this machine; goes on where an upload broke off."""
    with bar(f"uploading {name}", in_bytes=True) as progress:
        version = await client.adapters.upload(
            folder,
            adapter=name,
            upload_id=upload_id,
            labels=label_map(label),
            wait=wait,
            no_traffic=no_traffic,
            progress=progress,
        )
    print_version(version, json)


@app.command("list")
@connected
async def list_adapters(
    client: GatewayClient,
    prefix: Annotated[str, typer.Option(help="That names begin with.")] = "",
    json: Json = False,
) -> None:
    """List adapters with their traffic."""
    adapters = [adapter async for adapter in client.adapters.list(prefix=prefix)]
    if json:
        typer.echo(as_json(ListAdaptersResponse(adapters=adapters)))
    else:
        print_adapters(adapters)


@app.command()
@connected
async def show(
    client: GatewayClient,
    name: Name,
    version: Annotated[
        int | None, typer.Option(min=1, help="Show this version. Without: the adapter.")
    ] = None,
    json: Json = False,
) -> None:
    """Show an adapter, or one version of it with its findings and residency."""
    if version is None:
        print_adapter(await client.adapters.get(name), json)
    else:
        print_version(await client.adapters.get_version(name, version), json)


@app.command()
@connected
async def versions(
    client: GatewayClient,
    name: Name,
    show_deleted: Annotated[bool, typer.Option("--show-deleted", help="Deleted ones too.")] = False,
    json: Json = False,
) -> None:
    """List the versions of an adapter, newest first."""
    found = [
        version async for version in client.adapters.list_versions(name, show_deleted=show_deleted)
    ]
    if json:
        typer.echo(as_json(ListAdapterVersionsResponse(adapter_versions=found)))
    else:
        print_versions(found)


@app.command()
@connected
async def load(client: GatewayClient, name: Name, version: Number, json: Json = False) -> None:
    """Load a version into memory ahead of need."""
    print_version(await client.adapters.load(name, version), json)


@app.command()
@connected
async def unload(client: GatewayClient, name: Name, version: Number, json: Json = False) -> None:
    """Take a version out of memory; waits for the requests that run on it."""
    print_version(await client.adapters.unload(name, version), json)


@app.command()
@connected
async def delete(client: GatewayClient, name: Name, version: Number, json: Json = False) -> None:
    """Delete a version without traffic; waits for the requests that run on it."""
    print_version(await client.adapters.delete(name, version), json)


@app.command()
@connected
async def watch(
    client: GatewayClient,
    after: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=0, help="From the change after this one; 0: from the first ever."
        ),
    ] = None,
    adapter: Annotated[str, typer.Option(help="Of this adapter only.")] = "",
    json: Json = False,
) -> None:
    """Print each change as it happens, until Ctrl-C."""
    with suppress(asyncio.CancelledError):  # Ctrl-C is how a watch ends in order
        async with client.adapters.watch(after_sequence=after, adapter=adapter) as events:
            async for event in events:
                typer.echo(as_json(event, indent=None) if json else event_line(event))


# Without a name: its commands stand beside the ones above.
app.add_typer(traffic_app)


def _source_uri(source: str) -> str:
    """A path of this machine made absolute, for a gateway that runs here too."""
    return source if "://" in source else str(Path(source).absolute())
