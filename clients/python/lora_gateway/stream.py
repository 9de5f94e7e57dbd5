"""The tokens of one call as they come."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING, TypeAlias

import grpc

from lora_gateway._server_stream import ServerStream
from lora_gateway.errors import IncompleteStream
from lora_gateway.v1.inference_pb2 import (
    GenerateRequest,
    GenerateStreamResponse,
    GenerationDelta,
    GenerationFinished,
    GenerationStarted,
)

if TYPE_CHECKING:
    import grpc.aio

    _Call: TypeAlias = grpc.aio.UnaryStreamCall[GenerateRequest, GenerateStreamResponse]

GenerationEvent: TypeAlias = GenerationStarted | GenerationDelta | GenerationFinished
"""One event of a stream: `started` once, any number of deltas, `finished` once."""


class GenerationStream(ServerStream[GenerateRequest, GenerateStreamResponse]):
    """Events of one `GenerateStream` call, in order, for one task to read.

        async with client.stream("Once upon a time") as stream:
            async for text in stream.text():
                print(text, end="", flush=True)
        print(stream.finished.usage)

    Leaving the `async with` block, by whatever way, ends the call; so does dropping the last
    reference, as `async for event in client.stream(...)` does when it is left early. The
    server then aborts the request at once.
    """

    def __init__(self, call: _Call) -> None:
        super().__init__(call)
        self._started: GenerationStarted | None = None
        self._finished: GenerationFinished | None = None

    @property
    def started(self) -> GenerationStarted:
        """The event that opened the stream: who answers, and under which request id.

        Raises:
            RuntimeError: it was not read yet.
        """
        if self._started is None:
            raise RuntimeError("nothing of the stream has been read yet")
        return self._started

    @property
    def finished(self) -> GenerationFinished:
        """The event that closed the stream: finish reasons, usage, timings.

        Raises:
            RuntimeError: it was not read yet.
        """
        if self._finished is None:
            raise RuntimeError("the stream has not been read to its end")
        return self._finished

    def __aiter__(self) -> GenerationStream:
        return self

    async def __anext__(self) -> GenerationEvent:
        """The next event.

        Raises:
            GatewayError: the call failed; `errors.py` tells how the classes differ.
            IncompleteStream: the call ended in order, but without `finished`.
        """
        while not self._closed:
            response = await self._read()
            if response is None:
                self._require_finished()
                break
            match response.WhichOneof("event"):
                case "started":
                    self._started = response.started
                    return response.started
                case "delta":
                    return response.delta
                case "finished":
                    self._finished = response.finished
                    return response.finished
                case None:
                    continue  # a kind of event that is newer than this client
        raise StopAsyncIteration

    async def text(self, index: int = 0) -> AsyncGenerator[str, None]:
        """The text of the completion `index`, piece by piece; no piece is empty.

        Reads the stream: what else it holds for other completions is passed over.

        Raises:
            GatewayError: as reading the events does.
        """
        async for event in self:
            if isinstance(event, GenerationDelta) and event.index == index and event.text:
                yield event.text

    def _require_finished(self) -> None:
        if self._finished is None:
            raise IncompleteStream(
                "the stream ended without `finished`: the answer is incomplete",
                code=grpc.StatusCode.DATA_LOSS,
                request_id=self._started.request_id if self._started else "",
            )
