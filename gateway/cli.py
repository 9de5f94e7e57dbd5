"""The `gateway` command: serve, and talk to a gateway that serves.

Knows the client alone, so that `--help` and short calls start at once; `serve` imports
the server when it runs.
"""

from __future__ import annotations

import asyncio
import readline  # noqa: F401  gives input() its line editing and history
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, NoReturn

import typer

from gateway.cli_adapters import app as adapters_app
from gateway.cli_datasets import app as datasets_app
from gateway.cli_jobs import app as jobs_app
from gateway.cli_options import (
    DEFAULT_TARGET,
    Endpoint,
    Json,
    Target,
    Timeout,
    TlsCa,
    TlsCert,
    TlsKey,
    errors_told,
)
from gateway.cli_quarantine import app as quarantine_app
from gateway.cli_shards import app as shards_app
from gateway.cli_training import app as training_app
from gateway.terminal import as_json, enveloped, print_fields, print_text, summarize, tell
from lora_gateway import (
    ChatMessage,
    GatewayClient,
    GatewayError,
    GenerationStream,
    Model,
    Prompt,
    SamplingKeywords,
)

app = typer.Typer(
    name="gateway",
    help="Serve one base model with many LoRA adapters over typed gRPC.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(adapters_app, name="adapters")
app.add_typer(training_app)  # without a name: its command stands beside those below
app.add_typer(jobs_app, name="jobs")
app.add_typer(datasets_app, name="datasets")
app.add_typer(shards_app, name="shards")
app.add_typer(quarantine_app, name="quarantine")

_SAMPLING = "Sampling"


Adapter = Annotated[str, typer.Option(help="Adapter to use. Without: the base model.")]
Version = Annotated[
    int | None, typer.Option(min=1, help="Its version. Without: by the traffic split.")
]

MaxTokens = Annotated[
    int | None, typer.Option(min=1, help="Longest answer, in tokens.", rich_help_panel=_SAMPLING)
]
Temperature = Annotated[
    float | None, typer.Option(help="Randomness; 0 is greedy.", rich_help_panel=_SAMPLING)
]
TopP = Annotated[
    float | None,
    typer.Option(help="Share of likely tokens to sample from.", rich_help_panel=_SAMPLING),
]
Seed = Annotated[
    int | None, typer.Option(help="Makes the answer repeatable.", rich_help_panel=_SAMPLING)
]
Stop = Annotated[
    list[str] | None, typer.Option(help="End at this text; repeatable.", rich_help_panel=_SAMPLING)
]


@app.command(
    # Flags of the server are defined once, in gateway/settings.py; --help included.
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    add_help_option=False,
)
def serve(context: typer.Context) -> NoReturn:
    """Serve a base model and its adapters (`gateway serve --help` lists the flags)."""
    from gateway.serve import main

    raise typer.Exit(main(context.args))


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="Text to go on from; - reads standard input.")],
    adapter: Adapter = "",
    version: Version = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    seed: Seed = None,
    stop: Stop = None,
    stream: Annotated[
        bool, typer.Option("--stream/--no-stream", help="Print tokens as they come.")
    ] = True,
    json: Json = False,
    target: Target = DEFAULT_TARGET,
    tls_ca: TlsCa = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    timeout: Timeout = None,
) -> None:
    """Complete a prompt."""
    endpoint = Endpoint(target, tls_ca, tls_cert, tls_key)
    sampling = SamplingKeywords(
        max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed, stop=stop
    )
    question = _Question(adapter, version, timeout, sampling)
    text = sys.stdin.read() if prompt == "-" else prompt
    with errors_told(target):
        asyncio.run(
            _stream(endpoint, question, text, json)
            if stream
            else _generate(endpoint, question, text, json)
        )


@app.command()
def chat(
    adapter: Adapter = "",
    version: Version = None,
    system: Annotated[str, typer.Option(help="System message that opens the chat.")] = "",
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    seed: Seed = None,
    stop: Stop = None,
    target: Target = DEFAULT_TARGET,
    tls_ca: TlsCa = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    timeout: Timeout = None,
) -> None:
    """Chat line by line. Ctrl-C stops an answer, Ctrl-D ends the chat."""
    endpoint = Endpoint(target, tls_ca, tls_cert, tls_key)
    sampling = SamplingKeywords(
        max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed, stop=stop
    )
    question = _Question(adapter, version, timeout, sampling)
    messages = [ChatMessage(role="system", content=system)] if system else []
    with errors_told(target), asyncio.Runner() as runner:
        client = runner.run(endpoint.client())
        try:
            _converse(runner, client, question, messages, target)
        finally:
            runner.run(client.close())


@app.command()
def model(
    json: Json = False,
    target: Target = DEFAULT_TARGET,
    tls_ca: TlsCa = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    timeout: Timeout = None,
) -> None:
    """Show the base model with its limits, defaults and fingerprints."""
    endpoint = Endpoint(target, tls_ca, tls_cert, tls_key)

    async def fetch() -> Model:
        async with await endpoint.client() as client:
            return await client.get_model(timeout_s=timeout)

    with errors_told(target):
        served = asyncio.run(fetch())
    if json:
        typer.echo(as_json(served))
    else:
        print_fields(served)


@dataclass(frozen=True, slots=True)
class _Question:
    """What is asked of the gateway, but for the prompt."""

    adapter: str
    version: int | None
    timeout_s: float | None
    sampling: SamplingKeywords

    def stream(self, client: GatewayClient, prompt: Prompt) -> GenerationStream:
        return client.stream(
            prompt,
            adapter=self.adapter,
            version=self.version,
            timeout_s=self.timeout_s,
            **self.sampling,
        )


async def _generate(endpoint: Endpoint, question: _Question, prompt: str, json: bool) -> None:
    async with await endpoint.client() as client:
        answer = await client.generate(
            prompt,
            adapter=question.adapter,
            version=question.version,
            timeout_s=question.timeout_s,
            **question.sampling,
        )
    if json:
        typer.echo(as_json(answer))
        return
    completion = answer.completions[0]
    typer.echo(completion.text)
    summarize(answer.served_by, completion.finish_reason, answer.usage, answer.timings)


async def _stream(endpoint: Endpoint, question: _Question, prompt: str, json: bool) -> None:
    async with await endpoint.client() as client, question.stream(client, prompt) as stream:
        if json:
            async for event in stream:
                typer.echo(as_json(enveloped(event), indent=None))
            return
        await print_text(stream, [])
        finished = stream.finished
        reason = finished.completions[0].finish_reason
        summarize(stream.started.served_by, reason, finished.usage, finished.timings)


def _converse(
    runner: asyncio.Runner,
    client: GatewayClient,
    question: _Question,
    messages: list[ChatMessage],
    target: str,
) -> None:
    """Add to `messages` what the user says and the model answers, until the user ends it."""
    at_terminal = sys.stdin.isatty()
    for line in _lines(at_terminal):
        messages.append(ChatMessage(role="user", content=line))
        answer: list[str] = []
        try:
            runner.run(_answer(client, question, messages, answer))
        except KeyboardInterrupt:
            pass  # asked for: the answer stops here, the chat goes on
        except GatewayError as error:
            if not at_terminal:
                raise
            tell(error, target)
        # The model is to see what its reader saw, and no turn without an answer.
        if answer:
            messages.append(ChatMessage(role="assistant", content="".join(answer)))
        else:
            messages.pop()


async def _answer(
    client: GatewayClient, question: _Question, messages: list[ChatMessage], answer: list[str]
) -> None:
    async with question.stream(client, messages) as stream:
        await print_text(stream, answer)


def _lines(at_terminal: bool) -> Iterator[str]:
    """Lines that are not blank, up to the end of standard input."""
    if at_terminal:
        typer.echo("Ctrl-C stops an answer, Ctrl-D ends the chat.", err=True)
    while True:
        try:
            line = input("> " if at_terminal else "")
        except EOFError:
            if at_terminal:
                typer.echo()
            return
        except KeyboardInterrupt:
            if not at_terminal:
                raise
            typer.echo()  # as in a shell: drops the line that was being typed
            continue
        if line.strip():
            yield line
