"""`gateway shards`: look at shards, take one out of the route and put it back, explain a route."""

from __future__ import annotations

from typing import Annotated

import typer

from gateway.cli_options import Json, connected
from gateway.terminal import as_json
from gateway.terminal_shards import print_drained, print_route, print_shard, print_shards
from lora_gateway import GatewayClient
from lora_gateway.v1.admin_pb2 import ListShardsResponse

app = typer.Typer(
    help="Look after the shards of a gateway, on its own machine.",
    no_args_is_help=True,
)

Name = Annotated[str, typer.Argument(metavar="SHARD", help="The shard, for example shard-1.")]


@app.command("list")
@connected
async def list_shards(client: GatewayClient, json: Json = False) -> None:
    """List shards: how they are, what they do, what they have loaded."""
    shards = await client.admin.list_shards()
    if json:
        typer.echo(as_json(ListShardsResponse(shards=shards)))
    else:
        print_shards(shards)


@app.command()
@connected
async def drain(
    client: GatewayClient,
    shard: Name,
    wait: Annotated[
        bool, typer.Option("--wait/--no-wait", help="Until nothing runs there any more.")
    ] = False,
    json: Json = False,
) -> None:
    """Take a shard out of the route, once what it serves is loaded elsewhere."""
    print_drained(await client.admin.drain_shard(shard, wait=wait), json)


@app.command()
@connected
async def resume(client: GatewayClient, shard: Name, json: Json = False) -> None:
    """Put a shard back into the route, once what lives there is loaded."""
    print_shard(await client.admin.resume_shard(shard), json)


@app.command()
@connected
async def explain(
    client: GatewayClient,
    adapter: Annotated[
        str, typer.Argument(metavar="[ADAPTER]", help="Without: the base model.")
    ] = "",
    version: Annotated[
        int | None, typer.Option(min=1, help="Its version. Without: by the traffic split.")
    ] = None,
    session: Annotated[str, typer.Option(help="The session that the split goes by.")] = "",
    json: Json = False,
) -> None:
    """Tell which version and which shard a request would get now, and why."""
    answer = await client.admin.explain_route(adapter, version=version, session_id=session)
    print_route(answer, json)
