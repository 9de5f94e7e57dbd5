"""What every call of a client goes out with: a timeout, and the client's metadata."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias, TypeVar

import grpc.aio

from lora_gateway.errors import GatewayError

_Request = TypeVar("_Request")
_Response = TypeVar("_Response")

Metadata: TypeAlias = Mapping[str, str | bytes]
"""Metadata of a call; keys in lower case, those of bytes end in `-bin`."""


@dataclass(frozen=True, slots=True)
class Calls:
    """The defaults of one client, and how it calls a unary method with them."""

    timeout_s: float
    """Of a call that is answered at once."""
    stream_timeout_s: float
    """Of a stream, and of a call that is answered when work is done."""
    job_timeout_s: float
    """Of what takes as long as its data: an upload, an evaluation, reading a dataset."""
    metadata: Metadata

    async def unary(
        self,
        method: grpc.aio.UnaryUnaryMultiCallable[_Request, _Response],
        request: _Request,
        timeout_s: float | None,
        metadata: Metadata | None,
        *,
        waits: bool = False,
    ) -> _Response:
        """Call, and wait for the answer; `waits` picks the default of work for `timeout_s`.

        Raises:
            GatewayError: the call failed.
        """
        default_s = self.stream_timeout_s if waits else self.timeout_s
        try:
            return await method(
                request,
                timeout=default_s if timeout_s is None else timeout_s,
                metadata=self.merged(metadata),
            )
        except grpc.aio.AioRpcError as error:
            raise GatewayError.from_rpc_error(error) from error

    def merged(self, metadata: Metadata | None) -> tuple[tuple[str, str | bytes], ...]:
        """The client's metadata with that of the call, which wins."""
        return tuple({**self.metadata, **(metadata or {})}.items())
