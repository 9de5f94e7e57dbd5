"""Half of `gateway adapters`: which versions answer, and how well they do."""

from __future__ import annotations

import enum
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from google.protobuf.json_format import Parse, ParseError

from gateway.cli_options import Json, connected
from gateway.terminal import as_json
from gateway.terminal_adapters import (
    print_adapter,
    print_comparison,
    print_summary,
    result_line,
)
from gateway.terminal_table import bar
from lora_gateway import (
    EvaluationExample,
    EvaluationProgress,
    EvaluationResult,
    GatewayClient,
    Scorer,
    TrafficGuard,
)
from lora_gateway.v1.adapters_pb2 import EvaluateVersionResponse

app = typer.Typer()

_GUARD = "Guard: rolls the split back by itself"

Name = Annotated[str, typer.Argument(metavar="NAME", help="The adapter.")]
Etag = Annotated[str, typer.Option(help="Only if the adapter still has this etag.")]
Limit = Annotated[
    float | None, typer.Option(help="The version may have no more.", rich_help_panel=_GUARD)
]


class ScorerName(enum.StrEnum):
    """The scorers of the contract, as they are typed."""

    EXACT_MATCH = "exact_match"
    CONTAINS = "contains"
    VALID_JSON = "valid_json"
    LOG_LIKELIHOOD = "log_likelihood"

    @property
    def message(self) -> Scorer.ValueType:
        """As the contract has it."""
        return Scorer.Value(f"SCORER_{self.name}")


@app.command()
@connected
async def traffic(
    client: GatewayClient,
    name: Name,
    weights: Annotated[
        list[str] | None,
        typer.Argument(metavar="VERSION=WEIGHT", help="Without: show what stands."),
    ] = None,
    none: Annotated[bool, typer.Option("--none", help="Give no version any traffic.")] = False,
    etag: Etag = "",
    guard_version: Annotated[
        int | None, typer.Option(min=1, help="The version to watch.", rich_help_panel=_GUARD)
    ] = None,
    max_error_ratio: Limit = None,
    max_ttft_p95_ms: Limit = None,
    max_total_p95_ms: Limit = None,
    min_requests: Annotated[
        int | None, typer.Option(min=1, help="Judge after so many.", rich_help_panel=_GUARD)
    ] = None,
    json: Json = False,
) -> None:
    """Split an adapter's traffic over versions, or show the split."""
    limits = {
        "min_requests": min_requests,
        "max_error_ratio": max_error_ratio,
        "max_ttft_p95_ms": max_ttft_p95_ms,
        "max_total_p95_ms": max_total_p95_ms,
    }
    guard = _guard(guard_version, limits)
    if weights and none:
        raise typer.BadParameter("--none goes without weights")
    if not weights and not none:
        if etag or guard:
            raise typer.BadParameter("say which versions get traffic, for example 1=90 2=10")
        print_adapter(await client.adapters.get(name), json)
        return
    splits = dict(_weight(text) for text in weights or ())
    if len(splits) < len(weights or ()):
        raise typer.BadParameter("a version is named twice")
    print_adapter(await client.adapters.set_traffic(name, splits, etag=etag, guard=guard), json)


@app.command()
@connected
async def promote(
    client: GatewayClient,
    name: Name,
    version: Annotated[int, typer.Argument(metavar="VERSION", min=1, help="Gets all traffic.")],
    etag: Etag = "",
    json: Json = False,
) -> None:
    """Give one version all traffic."""
    print_adapter(await client.adapters.promote(name, version, etag=etag), json)


@app.command()
@connected
async def rollback(client: GatewayClient, name: Name, etag: Etag = "", json: Json = False) -> None:
    """Restore the split before the last change."""
    print_adapter(await client.adapters.rollback(name, etag=etag), json)


@app.command()
@connected
async def compare(
    client: GatewayClient,
    name: Name,
    versions: Annotated[
        str, typer.Option(metavar="N,N", help="The first is the baseline. Without: all.")
    ] = "",
    window: Annotated[
        int, typer.Option(min=0, help="Seconds to look back. 0: to the last change of traffic.")
    ] = 0,
    confidence: Annotated[float | None, typer.Option(help="Of the intervals: 0.95.")] = None,
    json: Json = False,
) -> None:
    """Compare how versions did on live traffic."""
    comparison = await client.adapters.compare(
        name, versions=_numbers(versions), window_s=window, confidence=confidence
    )
    if json:
        typer.echo(as_json(comparison))
    else:
        print_comparison(comparison)


@app.command()
@connected
async def evaluate(
    client: GatewayClient,
    name: Name,
    versions: Annotated[
        str, typer.Option(metavar="N,N", help="The first is the baseline; 0 is the base model.")
    ],
    data: Annotated[
        Path,
        typer.Option(
            metavar="FILE.jsonl", exists=True, dir_okay=False, help="Examples, one a line, here."
        ),
    ],
    scorer: Annotated[
        list[ScorerName] | None, typer.Option(help="Repeatable. Without: all that fit.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=0, help="Of each answer. 0: 256.")] = 0,
    max_concurrency: Annotated[int, typer.Option(min=0, help="Answers at once. 0: 4.")] = 0,
    results: Annotated[bool, typer.Option("--results", help="Print each answer too.")] = False,
    json: Json = False,
) -> None:
    """Run examples through versions and compare their scores."""
    at_terminal = sys.stdout.isatty()
    async with client.adapters.evaluate(
        name,
        _numbers(versions),
        examples=list(_examples(data)),
        scorers=[chosen.message for chosen in scorer or ()],
        max_tokens=max_tokens,
        max_concurrency=max_concurrency,
        return_results=results,
    ) as evaluation:
        # Lines that scroll through a bar would tear it.
        with bar(f"evaluating {name}", shown=not (results and at_terminal)) as progress:
            async for event in evaluation:
                match event:
                    case EvaluationProgress():
                        progress(event.done, event.total)
                    case EvaluationResult() if json:
                        message = EvaluateVersionResponse(result=event)
                        typer.echo(as_json(message, indent=None))
                    case EvaluationResult():
                        typer.echo(result_line(event))
        summary = evaluation.summary
    if json:
        typer.echo(as_json(EvaluateVersionResponse(summary=summary), indent=None))
    else:
        print_summary(summary)


# A score may be negative, and then looks like an option.
@app.command(context_settings={"ignore_unknown_options": True})
@connected
async def feedback(
    client: GatewayClient,
    request_id: Annotated[str, typer.Argument(help="That the answer came with.")],
    score: Annotated[float, typer.Argument(help="Higher is better.")],
    json: Json = False,
) -> None:
    """Score the answer to one request, for compare."""
    arm = await client.adapters.record_feedback(request_id, score)
    typer.echo(as_json(arm) if json else f"{arm.adapter}@{arm.version}")


def _weight(text: str) -> tuple[int, int]:
    version, _, weight = text.partition("=")
    if not (_is_number(version) and _is_number(weight)):
        raise typer.BadParameter(f"{text!r} is no VERSION=WEIGHT, for example 1=90")
    return int(version), int(weight)


def _numbers(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not all(_is_number(part) for part in parts):
        raise typer.BadParameter(f"{text!r} are no version numbers", param_hint="--versions")
    return [int(part) for part in parts]


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit()


def _guard(version: int | None, limits: dict[str, float | None]) -> TrafficGuard | None:
    given = {name: value for name, value in limits.items() if value is not None}
    if version is None:
        if given:
            raise typer.BadParameter("--guard-version says which version has these limits")
        return None
    return TrafficGuard(version=version, **given)  # type: ignore[arg-type]  # checked by protobuf


def _examples(path: Path) -> Iterator[EvaluationExample]:
    """The examples of the file. Raises ValueError that names the first line that is none."""
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            yield Parse(line, EvaluationExample())
        except (ParseError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}:{number}: {error}") from None
