"""A stream of answers that outlives the connection it came on."""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, TypeAlias, TypeVar, cast

import grpc
import grpc.aio

from lora_gateway._backoff import Backoff
from lora_gateway.errors import GatewayError, IncompleteStream, Overloaded, Unavailable

if TYPE_CHECKING:
    from typing import Self

Response = TypeVar("Response")

if TYPE_CHECKING:
    Call: TypeAlias = grpc.aio.UnaryStreamCall[Any, Response]


class ReconnectingStream(Generic[Response]):
    """Answers of a call that is made again, from where it stood, whenever it breaks off.

    For one task to read. Leaving the `async with` block, by whatever way, ends the call; so
    does dropping the last reference.
    """

    def __init__(self, *, reconnect: bool, silence_limit_s: float | None) -> None:
        """`reconnect` holds once the stream has begun; without a word for `silence_limit_s` the
        gateway is lost. None: it may be silent for any time."""
        self._reconnect = reconnect
        self._silence_limit_s = silence_limit_s
        self._backoff = Backoff()
        self._call: Call[Response] | None = None
        self._begun = False
        self._closed = False

    async def aclose(self) -> None:
        """End the stream. Reading on gives nothing. May be called again."""
        self._closed = True
        self._drop_call()

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
        # grpc.aio's calls hold references to themselves and wait for the garbage collector.
        self._drop_call()

    def _open(self) -> Call[Response]:
        """Make the call, from where the stream stands."""
        raise NotImplementedError

    async def _is_whole(self) -> bool:
        """Whether a call that has just ended in order has told everything."""
        raise NotImplementedError

    async def _receive(self) -> Response | None:
        """The next message, however long it takes; None: the stream is closed, or at its end.

        Cancelling this loses nothing that the place to go on from does not hold.

        Raises:
            Unavailable: the gateway was not there to begin with, or it is gone and `reconnect`
                is off.
            Overloaded: the same, but that it has no place for one more.
            GatewayError: the call failed otherwise.
        """
        while not self._closed:
            try:
                response = await self._read()
                if response is None and not await self._is_whole():
                    raise IncompleteStream(
                        "the stream ended before all was told", code=grpc.StatusCode.DATA_LOSS
                    )
            except (Unavailable, Overloaded, IncompleteStream) as error:
                if not (self._begun and self._reconnect):
                    raise
                await asyncio.sleep(self._backoff.delay_s(error.retry_delay_s))
                continue
            self._begun = True
            self._closed = response is None
            return response
        return None

    async def _read(self) -> Response | None:
        """The next message of the call; None: it ended in order."""
        if self._call is None:
            self._call = self._open()
        call, silent = self._call, False

        def give_up() -> None:
            nonlocal silent
            silent = True
            call.cancel()

        # Not `asyncio.wait_for`: up to Python 3.11 it loses a cancellation that comes together
        # with a message.
        timer = None
        if self._silence_limit_s is not None:
            timer = asyncio.get_running_loop().call_later(self._silence_limit_s, give_up)
        try:
            response = await call.read()
        except grpc.aio.AioRpcError as error:
            self._drop_call()
            raise GatewayError.from_rpc_error(error) from error
        except asyncio.CancelledError:
            self._drop_call()
            if not silent:
                raise
            raise Unavailable(
                f"the gateway was silent for {self._silence_limit_s:g} s",
                code=grpc.StatusCode.UNAVAILABLE,
            ) from None
        finally:
            if timer is not None:
                timer.cancel()
        if response is grpc.aio.EOF:
            self._drop_call()
            self._begun = True  # somebody answered
            return None
        return cast("Response", response)

    def _drop_call(self) -> None:
        if self._call is not None:
            self._call.cancel()
            self._call = None
