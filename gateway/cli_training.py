"""`gateway train`: from a file to an adapter version that answers."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from gateway.cli_options import Json, Labels, connected, label_map
from gateway.job_display import follow, require_success
from gateway.side_by_side import compared, print_comparison
from gateway.terminal import as_json
from gateway.terminal_datasets import print_dataset, print_report
from gateway.terminal_jobs import print_estimate
from gateway.terminal_table import bar, print_rows, printable
from gateway.training_options import (
    AllTraffic,
    BackendName,
    Canary,
    Format,
    PrecisionName,
    QuantizationName,
    init_from_of,
    traffic_percent,
)
from lora_gateway import (
    ChatMessage,
    Dataset,
    DatasetFormat,
    GatewayClient,
    GatewayError,
    JobSpec,
    Publication,
    PublicationState,
)
from lora_gateway.job_spec import JobKeywords, job_spec
from lora_gateway.v1.training_pb2 import (
    CreateJobResponse,
    EstimateJobResponse,
    GetDatasetResponse,
    ValidateDatasetResponse,
)

app = typer.Typer()

_RECIPE = "Recipe: what is left out takes the gateway's defaults"
_END = "At the end"


def _recipe(text: str, **limits: Any) -> Any:
    return typer.Option(help=text, rich_help_panel=_RECIPE, **limits)


@app.command()
@connected
async def train(
    client: GatewayClient,
    file: Annotated[
        Path,
        typer.Argument(
            metavar="DATA.jsonl", exists=True, dir_okay=False, help="Rows, one a line, here."
        ),
    ],
    adapter: Annotated[str, typer.Option(help="That the result becomes a version of.")],
    canary: Canary = None,
    all_traffic: AllTraffic = False,
    no_publish: Annotated[
        bool, typer.Option("--no-publish", help="Keep the result with the job alone.")
    ] = False,
    init_from: Annotated[
        str | None,
        typer.Option(metavar="ADAPTER[@VERSION]", help="Train this version further."),
    ] = None,
    init_from_checkpoint: Annotated[
        str | None,
        typer.Option(metavar="JOB[/STEP]", help="Train this checkpoint further."),
    ] = None,
    r: Annotated[int | None, _recipe("Rank of the adapter.", min=1)] = None,
    alpha: Annotated[float | None, _recipe("Scale of the adapter.")] = None,
    dropout: Annotated[float | None, _recipe("On the adapter's input.")] = None,
    epochs: Annotated[float | None, _recipe("Over the rows.")] = None,
    max_steps: Annotated[int | None, _recipe("End earlier.", min=1)] = None,
    lr: Annotated[float | None, _recipe("Learning rate at its highest.")] = None,
    batch: Annotated[int | None, _recipe("Rows computed at once.", min=1)] = None,
    accumulation: Annotated[int | None, _recipe("Micro-batches a step.", min=1)] = None,
    seed: Annotated[int | None, _recipe("Of weights, order and split.", min=0)] = None,
    eval_fraction: Annotated[float | None, _recipe("Of the rows, held out.")] = None,
    max_sequence_tokens: Annotated[int | None, _recipe("Of the longest row.", min=1)] = None,
    backend: Annotated[BackendName | None, _recipe("That trains.")] = None,
    quantization: Annotated[QuantizationName | None, _recipe("Of the base model.")] = None,
    precision: Annotated[PrecisionName | None, _recipe("That is computed in.")] = None,
    name: Annotated[str, typer.Option(help="Of the job. Without: made of the adapter's.")] = "",
    dataset_name: Annotated[
        str | None, typer.Option(help="Without: made of the file's name and its digest.")
    ] = None,
    format: Format = None,
    label: Labels = None,
    priority: Annotated[
        int, typer.Option(min=-10, max=10, help="Higher ones get a device first.")
    ] = 0,
    prompt: Annotated[
        str,
        typer.Option(
            help="Ask base and version this. Without: the dataset's first.", rich_help_panel=_END
        ),
    ] = "",
    max_tokens: Annotated[
        int, typer.Option(min=1, help="Of each answer.", rich_help_panel=_END)
    ] = 128,
    detach: Annotated[
        bool, typer.Option("--detach", help="Do not wait; `gateway jobs watch` does.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask before it begins.")] = False,
    json: Json = False,
) -> None:
    """Train an adapter on a file and publish it, with the whole way on the screen.

    Ctrl-C leaves the job to itself. Exits with 0 if it succeeded and what was to be published
    serves, 1 if not, 130 after Ctrl-C.
    """
    percent = traffic_percent(canary, all_traffic)
    if no_publish and percent is not None:
        raise typer.BadParameter("--no-publish goes without --canary and --all-traffic")
    keywords = JobKeywords(
        adapter=adapter,
        init_from=init_from_of(init_from, init_from_checkpoint),
        traffic_percent=None if no_publish else percent or 0,
        r=r,
        alpha=alpha,
        dropout=dropout,
        epochs=epochs,
        max_steps=max_steps,
        learning_rate=lr,
        micro_batch_size=batch,
        gradient_accumulation=accumulation,
        seed=seed,
        eval_fraction=eval_fraction,
        max_sequence_tokens=max_sequence_tokens,
        backend=backend.message if backend else None,
        quantization=quantization.message if quantization else None,
        precision=precision.message if precision else None,
        format=format.message if format else None,
    )
    labels = label_map(label)
    dataset = await _uploaded(client, file, dataset_name, keywords, json)
    keywords["dataset"] = dataset.name
    spec = job_spec(None, keywords)
    await _checked(client, spec, priority, json)
    if not (yes or json) and sys.stdin.isatty() and sys.stdout.isatty():
        await _confirm()
    job = await client.training.create_job(spec, job_id=name, labels=labels, priority=priority)
    if json:
        typer.echo(as_json(CreateJobResponse(job=job), indent=None))
    else:
        print_rows(("job", job.name))
    if detach:
        if not json:
            typer.echo(f"follow it:  gateway jobs watch {job.name}")
        return
    job = await follow(client, job.name, after=0, json=json)
    if job.publication.state == PublicationState.PUBLICATION_STATE_SERVING:
        from gateway.first_prompt import first_prompt

        asked = [ChatMessage(role="user", content=prompt)] if prompt else []
        if asked := asked or await asyncio.to_thread(first_prompt, file, format):
            await _compare(client, asked, job.publication, max_tokens, json)
    require_success(job)


async def _compare(
    client: GatewayClient,
    asked: list[ChatMessage],
    publication: Publication,
    max_tokens: int,
    json: bool,
) -> None:
    """Show what base and version answer. What was asked for is done, whatever comes of this."""
    try:
        answers = await compared(client, asked, publication, max_tokens)
    except GatewayError as error:
        why = printable(" ".join(str(error).split()))
        typer.echo(f"note: base model and version were not compared: {why}", err=True)
    else:
        print_comparison(answers, json)


async def _confirm() -> None:
    """Ask whether to begin. Raises Abort unless the answer is yes."""
    typer.echo("train? [Y/n] ", nl=False)
    loop, typed = asyncio.get_running_loop(), asyncio.Event()
    # Not `typer.confirm`: it would hold the loop, which Ctrl-C could then not end.
    loop.add_reader(sys.stdin, typed.set)
    try:
        await typed.wait()
    finally:
        loop.remove_reader(sys.stdin)
    line = sys.stdin.readline()
    if not line or line.strip().lower() not in ("", "y", "yes"):
        raise typer.Abort


async def _uploaded(
    client: GatewayClient, file: Path, name: str | None, keywords: JobKeywords, json: bool
) -> Dataset:
    with bar(f"uploading {file.name}", in_bytes=True) as progress:
        dataset = await client.training.upload_dataset(
            file,
            dataset=name,
            format=keywords.get("format") or DatasetFormat.DATASET_FORMAT_UNSPECIFIED,
            progress=progress,
        )
    if json:
        typer.echo(as_json(GetDatasetResponse(dataset=dataset), indent=None))
    else:
        print_dataset(dataset, json=False)
        typer.echo()
    return dataset


async def _checked(client: GatewayClient, spec: JobSpec, priority: int, json: bool) -> None:
    """Show what was found in the dataset and what the job would cost; exit if it is not valid."""
    with bar(f"reading {spec.dataset}"):
        report = await client.training.validate_dataset(spec.dataset, data=spec.data)
    if json:
        typer.echo(as_json(ValidateDatasetResponse(report=report), indent=None))
    else:
        print_report(report)
        typer.echo()
    if not report.valid:
        typer.echo("error: the dataset is not valid, so nothing was started", err=True)
        raise typer.Exit(1)
    estimate = await client.training.estimate_job(spec, priority=priority)
    if json:
        typer.echo(as_json(EstimateJobResponse(estimate=estimate), indent=None))
    else:
        print_estimate(estimate)
        typer.echo()
