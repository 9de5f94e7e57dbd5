"""`gateway jobs`: look at training jobs, follow them, end them, publish what they saved."""

from __future__ import annotations

import asyncio
import codecs
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from gateway.cli_options import Json, connected
from gateway.curves import Curves
from gateway.job_display import follow, require_success
from gateway.terminal import as_json
from gateway.terminal_jobs import print_checkpoints, print_job, print_jobs, print_publication
from gateway.terminal_table import visible
from gateway.training_options import AllTraffic, Canary, StateName, publish_spec
from lora_gateway import GatewayClient, PublicationState
from lora_gateway.v1.training_pb2 import ListCheckpointsResponse, ListJobsResponse

app = typer.Typer(help="Manage training jobs.", no_args_is_help=True)

Name = Annotated[str, typer.Argument(metavar="NAME", help="The job.")]


@app.command("list")
@connected
async def list_jobs(
    client: GatewayClient,
    state: Annotated[list[StateName] | None, typer.Option(help="Repeatable.")] = None,
    adapter: Annotated[str, typer.Option(help="Of this adapter only.")] = "",
    json: Json = False,
) -> None:
    """List jobs, newest first."""
    states = [chosen.message for chosen in state or ()]
    jobs = [job async for job in client.training.list_jobs(states=states, adapter=adapter)]
    if json:
        typer.echo(as_json(ListJobsResponse(jobs=jobs)))
    else:
        print_jobs(jobs)


@app.command()
@connected
async def show(client: GatewayClient, name: Name, json: Json = False) -> None:
    """Show a job with its progress and publication."""
    print_job(await client.training.get_job(name), json)


@app.command()
@connected
async def watch(
    client: GatewayClient,
    name: Name,
    after: Annotated[
        int, typer.Option(metavar="N", min=0, help="From the event after this one.")
    ] = 0,
    json: Json = False,
) -> None:
    """Follow a job to its end. Ctrl-C leaves it to itself.

    Exits with 0 if it succeeded and what was to be published serves, 1 if not, 130 after Ctrl-C.
    """
    require_success(await follow(client, name, after=after, json=json))


@app.command()
@connected
async def cancel(
    client: GatewayClient,
    name: Name,
    discard: Annotated[
        bool, typer.Option("--discard", help="Keep no checkpoint; else the newest is kept.")
    ] = False,
    json: Json = False,
) -> None:
    """Ask a job to end."""
    print_job(await client.training.cancel_job(name, discard=discard), json)


@app.command()
@connected
async def pause(client: GatewayClient, name: Name, json: Json = False) -> None:
    """Ask a job to save and to leave its device, until it is resumed."""
    print_job(await client.training.pause_job(name), json)


@app.command()
@connected
async def resume(client: GatewayClient, name: Name, json: Json = False) -> None:
    """Let a paused job go on from its newest checkpoint."""
    print_job(await client.training.resume_job(name), json)


@app.command()
@connected
async def logs(
    client: GatewayClient,
    name: Name,
    offset: Annotated[int, typer.Option(min=0, help="Of the first byte.")] = 0,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="To the job's end.")] = False,
) -> None:
    """Print what the training process printed."""
    # Characters that are cut between two pieces are whole; line ends of bars are line ends.
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    with suppress(asyncio.CancelledError):  # Ctrl-C is how following ends in order
        async with client.training.job_logs(name, offset=offset, follow=follow) as pieces:
            async for data in pieces:
                text = decoder.decode(data).replace("\r", "\n")
                typer.echo(visible(text, kept="\n\t"), nl=False)
        typer.echo(visible(decoder.decode(b"", final=True)), nl=False)


@app.command()
@connected
async def plot(
    client: GatewayClient,
    name: Name,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", dir_okay=False, help="PNG, SVG or PDF. Without: NAME.png here."
        ),
    ] = None,
) -> None:
    """Draw loss, learning rate and speed of a job as it stands now."""
    job = await client.training.get_job(name)
    curves = Curves()
    async with client.training.watch_job(name, reconnect=False) as events:
        async for event in events:
            curves.add(event)
            if event.sequence >= job.last_sequence:
                break
    path = output or Path(f"{job.name}.png")
    await asyncio.to_thread(curves.save, path, f"{job.name}: {job.spec.adapter}")
    typer.echo(str(path))


@app.command()
@connected
async def delete(client: GatewayClient, name: Name) -> None:
    """Delete a job that has ended, with events, logs and checkpoints. Its versions stay."""
    await client.training.delete_job(name)
    typer.echo(f"deleted job {name}")


@app.command()
@connected
async def checkpoints(client: GatewayClient, name: Name, json: Json = False) -> None:
    """List what a job has saved, newest first."""
    found = await client.training.list_checkpoints(name)
    if json:
        typer.echo(as_json(ListCheckpointsResponse(checkpoints=found)))
    else:
        print_checkpoints(found)


@app.command()
@connected
async def publish(
    client: GatewayClient,
    name: Name,
    step: Annotated[
        int | None, typer.Option(min=1, help="Of the checkpoint. Without: the newest.")
    ] = None,
    adapter: Annotated[str, typer.Option(help="Without: as the job says.")] = "",
    canary: Canary = None,
    all_traffic: AllTraffic = False,
    json: Json = False,
) -> None:
    """Pass a checkpoint through the gate and make it a version."""
    publication = await client.training.publish_checkpoint(
        name, step=step, adapter=adapter, publish=publish_spec(canary, all_traffic)
    )
    if json:
        typer.echo(as_json(publication))
    else:
        print_publication(publication)
    if publication.state != PublicationState.PUBLICATION_STATE_SERVING:
        raise typer.Exit(1)
