"""Options that the commands of `gateway` share, and the call that they are for."""

from __future__ import annotations

import asyncio
import functools
import inspect
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Concatenate, ParamSpec

import grpc
import typer

from gateway.terminal import tell
from lora_gateway import GatewayClient, GatewayError

DEFAULT_TARGET = "127.0.0.1:50051"

_CONNECTION = "Connection"
_Parameters = ParamSpec("_Parameters")


def _pem_file(text: str) -> Any:
    return typer.Option(
        help=text, exists=True, dir_okay=False, readable=True, rich_help_panel=_CONNECTION
    )


Labels = Annotated[
    list[str] | None, typer.Option("--label", metavar="KEY=VALUE", help="Repeatable.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
Target = Annotated[
    str,
    typer.Option(
        metavar="HOST:PORT",
        envvar="GATEWAY_TARGET",
        help="Where the gateway listens.",
        rich_help_panel=_CONNECTION,
    ),
]
TlsCa = Annotated[Path | None, _pem_file("Use TLS; CA of the server's certificate, PEM.")]
TlsCert = Annotated[Path | None, _pem_file("Use mutual TLS; our certificate chain, PEM.")]
TlsKey = Annotated[Path | None, _pem_file("The private key of --tls-cert, PEM.")]
Timeout = Annotated[
    float | None,
    typer.Option(min=0, help="For each answer, in seconds.", rich_help_panel=_CONNECTION),
]


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where the gateway is and how to trust it. Raises BadParameter for half a key pair."""

    target: str
    ca: Path | None
    cert: Path | None
    key: Path | None
    timeout_s: float | None = None
    """Of every call. None: the client's defaults."""

    def __post_init__(self) -> None:
        if (self.cert is None) != (self.key is None):
            raise typer.BadParameter("--tls-cert and --tls-key belong together")

    async def client(self) -> GatewayClient:
        """A coroutine, since a client belongs to the loop that it is made in."""
        if self.timeout_s is None:
            return GatewayClient(self.target, tls=self._credentials())
        return GatewayClient(
            self.target,
            tls=self._credentials(),
            default_timeout_s=self.timeout_s,
            default_stream_timeout_s=self.timeout_s,
            default_job_timeout_s=self.timeout_s,
        )

    def _credentials(self) -> grpc.ChannelCredentials | None:
        if self.ca is None and self.cert is None:
            return None
        ca, cert, key = (
            path.read_bytes() if path else None for path in (self.ca, self.cert, self.key)
        )
        return grpc.ssl_channel_credentials(ca, key, cert)


@contextmanager
def errors_told(target: str) -> Iterator[None]:
    """Tell what failed on standard error, and exit with code 1."""
    try:
        yield
    except GatewayError as error:
        tell(error, target)
        raise typer.Exit(1) from None
    except ValueError as error:
        # What fits into no message: a number beyond its type, bytes that are no UTF-8.
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None


def connected(
    command: Callable[Concatenate[GatewayClient, _Parameters], Coroutine[Any, Any, None]],
) -> Callable[..., None]:
    """A command that gets the connection options besides its own, and a client for them."""

    @functools.wraps(command)
    def run(
        *args: Any,
        target: str,
        tls_ca: Path | None,
        tls_cert: Path | None,
        tls_key: Path | None,
        timeout: float | None,
        **kwargs: Any,
    ) -> None:
        endpoint = Endpoint(target, tls_ca, tls_cert, tls_key, timeout)

        async def called() -> None:
            async with await endpoint.client() as client:
                await command(client, *args, **kwargs)

        with errors_told(target):
            asyncio.run(called())

    # typer reads the options out of the signature; the client is none of them.
    signature = inspect.signature(command, eval_str=True)
    own = list(signature.parameters.values())[1:]
    run.__signature__ = signature.replace(parameters=[*own, *_CONNECTION_PARAMETERS])  # type: ignore[attr-defined]
    return run


def label_map(given: list[str] | None) -> dict[str, str]:
    """The labels by key. Raises BadParameter for one without a value."""
    labels = {}
    for label in given or ():
        key, equals, value = label.partition("=")
        if not key or not equals:
            raise typer.BadParameter(f"{label!r} is no KEY=VALUE", param_hint="--label")
        labels[key] = value
    return labels


_CONNECTION_PARAMETERS = [
    inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=option)
    for name, default, option in (
        ("target", DEFAULT_TARGET, Target),
        ("tls_ca", None, TlsCa),
        ("tls_cert", None, TlsCert),
        ("tls_key", None, TlsKey),
        ("timeout", None, Timeout),
    )
]
