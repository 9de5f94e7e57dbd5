"""The changes of adapters as they happen, through restarts of the gateway."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, TypeAlias

import grpc
import grpc.aio

from lora_gateway._backoff import Backoff
from lora_gateway.errors import GatewayError, IncompleteStream, Unavailable
from lora_gateway.v1.adapters_pb2 import (
    AdapterEvent,
    WatchAdaptersRequest,
    WatchAdaptersResponse,
)

if TYPE_CHECKING:
    _Call: TypeAlias = grpc.aio.UnaryStreamCall[WatchAdaptersRequest, WatchAdaptersResponse]

SILENCE_LIMIT_S = 60.0
"""Without a word for so long the gateway is lost: it sends a heartbeat every 15 s."""


class AdapterWatch:
    """Changes of adapters, each once and in order, for one task to read.

        async for event in client.adapters.watch(after_sequence=0):
            print(event.sequence, event.adapter, event.version, event.actor)

    Once it has begun, a watch that loses the gateway calls again until it answers, and goes on
    behind the last event. Leaving the `async with` block, by whatever way, ends the call; so
    does dropping the last reference.
    """

    def __init__(
        self,
        open_call: Callable[[WatchAdaptersRequest], _Call],
        *,
        after_sequence: int | None,
        adapter: str,
        reconnect: bool,
        silence_limit_s: float = SILENCE_LIMIT_S,
    ) -> None:
        self._open_call = open_call
        self._adapter = adapter
        self._reconnect = reconnect
        self._silence_limit_s = silence_limit_s
        self._sequence = after_sequence
        self._told_sequence = after_sequence or 0
        self._backoff = Backoff()
        self._call: _Call | None = None
        self._begun = False
        self._closed = False

    @property
    def sequence(self) -> int | None:
        """Where the watch stands: give it as `after_sequence` to another one to go on.

        None: not known yet; a watch of new events alone learns it from the first message.
        """
        return self._sequence

    def __aiter__(self) -> AdapterWatch:
        return self

    async def __anext__(self) -> AdapterEvent:
        """The next event, however long it takes to come.

        Cancelling this loses no event: the next call of it goes on behind the last one.

        Raises:
            Unavailable: the gateway was not there to begin with, or it is gone and `reconnect`
                is off.
            GatewayError: the call failed otherwise, for example with reason SEQUENCE_UNKNOWN.
        """
        while not self._closed:
            try:
                response = await self._read()
            except (Unavailable, IncompleteStream) as error:
                if not (self._begun and self._reconnect):
                    raise
                await asyncio.sleep(self._backoff.delay_s(error.retry_delay_s))
                continue
            self._begun = True
            event = self._event_in(response)
            if event is not None:
                return event
        raise StopAsyncIteration

    async def aclose(self) -> None:
        """End the watch. Reading on gives nothing. May be called again."""
        self._closed = True
        self._drop_call()

    async def __aenter__(self) -> AdapterWatch:
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

    def _event_in(self, response: WatchAdaptersResponse) -> AdapterEvent | None:
        """The event that the message tells, if it does and it was not told before."""
        match response.WhichOneof("item"):
            case "event" if response.event.sequence > self._told_sequence:
                self._sequence = self._told_sequence = response.event.sequence
                self._backoff.reset()
                return response.event
            case "heartbeat" if self._sequence is None:
                # Only where new events alone are wanted: in a replay the first heartbeat
                # is ahead of the events that are still to come.
                self._sequence = response.heartbeat.sequence
        return None

    async def _read(self) -> WatchAdaptersResponse:
        if self._call is None:
            self._call = self._open_call(
                WatchAdaptersRequest(after_sequence=self._sequence, adapter=self._adapter)
            )
        call, silent = self._call, False

        def give_up() -> None:
            nonlocal silent
            silent = True
            call.cancel()

        # Not `asyncio.wait_for`: up to Python 3.11 it loses a cancellation that comes together
        # with an event.
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
                f"the watch was silent for {self._silence_limit_s:g} s",
                code=grpc.StatusCode.UNAVAILABLE,
            ) from None
        finally:
            timer.cancel()
        if isinstance(response, WatchAdaptersResponse):
            return response
        self._drop_call()
        raise IncompleteStream(
            "the watch ended, which it never does by itself", code=grpc.StatusCode.DATA_LOSS
        )

    def _drop_call(self) -> None:
        if self._call is not None:
            self._call.cancel()
            self._call = None
