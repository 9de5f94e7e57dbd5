"""What all streams of answers have in common: reading them, and ending their call."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, Generic, TypeVar, cast

import grpc.aio

from lora_gateway.errors import GatewayError

if TYPE_CHECKING:
    from typing import Self

Request = TypeVar("Request")
Response = TypeVar("Response")


class ServerStream(Generic[Request, Response]):
    """The answers of one streaming call, for one task to read.

    Leaving the `async with` block, by whatever way, ends the call; so does dropping the last
    reference.
    """

    def __init__(self, call: grpc.aio.UnaryStreamCall[Request, Response]) -> None:
        self._call = call
        self._closed = False

    async def _read(self) -> Response | None:
        """The next message; None: there is none, because the call ended in order.

        Raises:
            GatewayError: the call failed.
        """
        try:
            response = await self._call.read()
        except grpc.aio.AioRpcError as error:
            raise GatewayError.from_rpc_error(error) from error
        return None if response is grpc.aio.EOF else cast("Response", response)

    async def aclose(self) -> None:
        """End the call, if it has not ended. Reading on gives nothing. May be called again."""
        self._closed = True
        self._call.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()

    def __del__(self) -> None:
        # grpc.aio would do so too, but its calls hold references to themselves and
        # wait for the garbage collector, while the engine works for nobody.
        self._call.cancel()
