"""The changes of adapters as they happen, through restarts of the gateway."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

from lora_gateway._reconnecting_stream import ReconnectingStream
from lora_gateway.v1.adapters_pb2 import (
    AdapterEvent,
    WatchAdaptersRequest,
    WatchAdaptersResponse,
)

if TYPE_CHECKING:
    import grpc.aio

    _Call: TypeAlias = grpc.aio.UnaryStreamCall[WatchAdaptersRequest, WatchAdaptersResponse]

SILENCE_LIMIT_S = 60.0
"""Without a word for so long the gateway is lost: it sends a heartbeat every 15 s."""


class AdapterWatch(ReconnectingStream[WatchAdaptersResponse]):
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
        super().__init__(reconnect=reconnect, silence_limit_s=silence_limit_s)
        self._open_call = open_call
        self._adapter = adapter
        self._sequence = after_sequence
        self._told_sequence = after_sequence or 0

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
            Overloaded: the same, but that it has no place for one more.
            GatewayError: the call failed otherwise, for example with reason SEQUENCE_UNKNOWN.
        """
        while (response := await self._receive()) is not None:
            event = self._event_in(response)
            if event is not None:
                return event
        raise StopAsyncIteration

    def _open(self) -> _Call:
        return self._open_call(
            WatchAdaptersRequest(after_sequence=self._sequence, adapter=self._adapter)
        )

    async def _is_whole(self) -> bool:
        return False  # it never ends by itself

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
