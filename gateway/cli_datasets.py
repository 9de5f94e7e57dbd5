"""`gateway datasets`: send datasets, look at them as the trainer does, delete them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gateway.cli_options import Json, connected
from gateway.terminal import as_json
from gateway.terminal_datasets import print_dataset, print_datasets, print_preview, print_report
from gateway.terminal_table import bar
from gateway.training_options import Format
from lora_gateway import DatasetFormat, DataSpec, GatewayClient
from lora_gateway.v1.training_pb2 import ListDatasetsResponse

app = typer.Typer(help="Manage what adapters are trained on.", no_args_is_help=True)

Name = Annotated[str, typer.Argument(metavar="NAME", help="The dataset.")]
MaxBadRatio = Annotated[
    float | None, typer.Option(help="Of all lines that may be bad. Without: 0.05.")
]
MaxSequenceTokens = Annotated[
    int | None, typer.Option(min=1, help="Of the longest row. Without: 2048, or what is served.")
]


@app.command()
@connected
async def upload(
    client: GatewayClient,
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE.jsonl", exists=True, dir_okay=False, help="Rows, one a line, here."
        ),
    ],
    name: Annotated[
        str | None, typer.Option(help="Without: made of the file's name and its digest.")
    ] = None,
    format: Format = None,
    json: Json = False,
) -> None:
    """Send a dataset from this machine; goes on where an upload broke off."""
    with bar(f"uploading {file.name}", in_bytes=True) as progress:
        dataset = await client.training.upload_dataset(
            file,
            dataset=name,
            format=format.message if format else DatasetFormat.DATASET_FORMAT_UNSPECIFIED,
            progress=progress,
        )
    print_dataset(dataset, json)


@app.command("list")
@connected
async def list_datasets(client: GatewayClient, json: Json = False) -> None:
    """List datasets."""
    datasets = [dataset async for dataset in client.training.list_datasets()]
    if json:
        typer.echo(as_json(ListDatasetsResponse(datasets=datasets)))
    else:
        print_datasets(datasets)


@app.command()
@connected
async def show(client: GatewayClient, name: Name, json: Json = False) -> None:
    """Show a dataset."""
    print_dataset(await client.training.get_dataset(name), json)


@app.command()
@connected
async def validate(
    client: GatewayClient,
    name: Name,
    format: Format = None,
    max_bad_ratio: MaxBadRatio = None,
    max_sequence_tokens: MaxSequenceTokens = None,
    max_issues: Annotated[
        int | None, typer.Option(min=1, help="Bad lines to list. Without: 100.")
    ] = None,
    json: Json = False,
) -> None:
    """Read every line and count tokens. Exits with 1 if a job would be refused."""
    data = _data(format, max_bad_ratio, max_sequence_tokens)
    with bar(f"reading {name}"):
        report = await client.training.validate_dataset(name, data=data, max_issues=max_issues)
    if json:
        typer.echo(as_json(report))
    else:
        print_report(report)
    if not report.valid:
        raise typer.Exit(1)


@app.command()
@connected
async def preview(
    client: GatewayClient,
    name: Name,
    line: Annotated[int, typer.Argument(min=1, help="Of the file, from 1.")] = 1,
    format: Format = None,
    max_sequence_tokens: MaxSequenceTokens = None,
    json: Json = False,
) -> None:
    """Show the tokens of one line, and which of them are trained on."""
    data = _data(format, None, max_sequence_tokens)
    found = await client.training.preview_tokens(name, line, data=data)
    if json:
        typer.echo(as_json(found))
    else:
        print_preview(found)


@app.command()
@connected
async def delete(client: GatewayClient, name: Name) -> None:
    """Delete a dataset that no unfinished job needs."""
    await client.training.delete_dataset(name)
    typer.echo(f"deleted dataset {name}")


def _data(format: Format, max_bad_ratio: float | None, max_sequence_tokens: int | None) -> DataSpec:
    return DataSpec(
        format=format.message if format else DatasetFormat.DATASET_FORMAT_UNSPECIFIED,
        max_bad_ratio=max_bad_ratio,
        max_sequence_tokens=max_sequence_tokens,
    )
