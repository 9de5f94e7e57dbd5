"""Follows a job on the screen: a live bar at a terminal, lines in a pipe, JSON for programs."""

from __future__ import annotations

import asyncio
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

import typer

from gateway.curves import Curves
from gateway.terminal import as_json
from gateway.terminal_jobs import (
    error_text,
    event_line,
    print_publication,
    state_text,
    succeeded,
)
from gateway.terminal_table import duration_text, printable
from lora_gateway import GatewayClient, Job, JobEvent
from lora_gateway.v1.training_pb2 import GetJobResponse, WatchJobResponse

if TYPE_CHECKING:
    from rich.progress import Progress as Bars

LINE_INTERVAL_S = 1.0
"""Between two steps in a pipe; what is not a step is always told."""
CHART_ROWS = 14
DETACHED = 130
"""The exit code of what Ctrl-C ended, as shells have it: whether the job succeeds is not known."""


class Display(Protocol):
    """Where events go."""

    def show(self, event: JobEvent) -> None: ...


async def follow(client: GatewayClient, name: str, *, after: int, json: bool) -> Job:
    """Show a job's events to its end, then what became of it.

    Raises:
        typer.Exit: Ctrl-C came first; the job goes on.
        GatewayError: the watch failed.
    """
    curves = Curves()
    try:
        with display(name, json) as shown:
            async with client.training.watch_job(name, after_sequence=after) as events:
                async for event in events:
                    curves.add(event)
                    shown.show(event)
        job = await client.training.get_job(name)
    except asyncio.CancelledError:  # Ctrl-C is how to leave a job to itself
        typer.echo(
            f"left job {name} to itself: it goes on\n"
            f"  come back:  gateway jobs watch {name}\n"
            f"  cancel it:  gateway jobs cancel {name}",
            err=True,
        )
        raise typer.Exit(DETACHED) from None
    if json:
        typer.echo(as_json(GetJobResponse(job=job), indent=None))
    else:
        _print_end(job, curves)
    return job


@contextmanager
def display(name: str, json: bool) -> Iterator[Display]:
    """The one that fits what standard output is."""
    if json:
        yield JsonDisplay()
    elif sys.stdout.isatty():
        with LiveDisplay.opened(name) as live:
            yield live
    else:
        yield LineDisplay()


def require_success(job: Job) -> None:
    """Exit with 1 unless all that was asked of the job was done."""
    if not succeeded(job):
        raise typer.Exit(1)


class JsonDisplay:
    """An object a line, as on the wire."""

    def show(self, event: JobEvent) -> None:
        typer.echo(as_json(WatchJobResponse(event=event), indent=None))


class LineDisplay:
    """A line for each event, but not for each of many steps."""

    def __init__(self) -> None:
        self._told_s = -LINE_INTERVAL_S

    def show(self, event: JobEvent) -> None:
        if event.WhichOneof("payload") == "progress":
            progress = event.progress
            telling = progress.HasField("eval_loss") or progress.step == progress.total_steps
            now_s = time.monotonic()
            if not telling and now_s - self._told_s < LINE_INTERVAL_S:
                return
            self._told_s = now_s
        typer.echo(event_line(event))


class LiveDisplay:
    """A bar with steps, loss, speed and time left; what is not a step is a line above it."""

    def __init__(self, bars: Bars, name: str) -> None:
        self._bars = bars
        self._task = bars.add_task(printable(name), total=None, numbers="")
        self._loss = self._eval_loss = ""

    @classmethod
    @contextmanager
    def opened(cls, name: str) -> Iterator[LiveDisplay]:
        """On standard output, gone when it is left."""
        # Takes as long to import as all else here, and few commands have a bar.
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        with Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}", markup=False),
            console=Console(markup=False, highlight=False),
            transient=True,
        ) as bars:
            yield cls(bars, name)

    def show(self, event: JobEvent) -> None:
        kind = event.WhichOneof("payload")
        if kind == "progress":
            self._step(event)
            return
        if kind == "state_changed":
            self._bars.update(self._task, description=state_text(event.state_changed.state))
        self._bars.console.print(event_line(event), markup=False, highlight=False)

    def _step(self, event: JobEvent) -> None:
        progress = event.progress
        if progress.HasField("loss"):
            self._loss = f"loss {progress.loss:.4f}"
        if progress.HasField("eval_loss"):
            self._eval_loss = f"eval {progress.eval_loss:.4f}"
        eta_s = progress.eta.ToTimedelta().total_seconds()
        numbers = (
            self._loss,
            self._eval_loss,
            f"{progress.tokens_per_second:.0f} tokens/s",
            f"ETA {duration_text(eta_s)}",
        )
        self._bars.update(
            self._task,
            completed=progress.step,
            total=progress.total_steps or None,
            numbers="  ".join(filter(None, numbers)),
        )


def _print_end(job: Job, curves: Curves) -> None:
    """The curve at a terminal, the gate's report, and how it ended."""
    if sys.stdout.isatty():
        columns = shutil.get_terminal_size().columns
        if chart := curves.chart(min(columns, 100) - 1, CHART_ROWS):
            typer.echo(f"loss by step{'  ◆ eval loss' if curves.eval_loss else ''}\n{chart}")
    if job.HasField("publication"):
        print_publication(job.publication)
    typer.echo(f"job {printable(job.name)} {state_text(job.state)}")
    if job.HasField("error"):
        typer.echo(f"error: {printable(error_text(job))}", err=True)
        typer.echo(f"  what the trainer printed: gateway jobs logs {job.name}", err=True)
    elif not succeeded(job) and job.publication.reasons:
        typer.echo("error: the adapter was not published; see the reasons above", err=True)
