"""The status that a call with a stream of requests really ended with."""

from __future__ import annotations

from typing import Any, TypeAlias

import grpc
import grpc.aio

_Call: TypeAlias = grpc.aio.StreamUnaryCall[Any, Any]


class CallEnd:
    """Listens to a call from its begin.

    A message that is written while the server's refusal arrives fails to be sent, and grpc.aio
    then says INTERNAL in place of the refusal. It may do so before the refusal or after it:
    whoever awaits the call hears what was said last, and this what was said first.
    """

    def __init__(self, call: _Call) -> None:
        self._first: grpc.aio.AioRpcError | None = None
        call.add_done_callback(self._listen)

    def error(self, awaited: grpc.aio.AioRpcError) -> grpc.aio.AioRpcError:
        """The server's error, if there is one; `awaited` is what awaiting the call raised."""
        own = awaited.code() is grpc.StatusCode.INTERNAL and not awaited.trailing_metadata()
        return self._first if own and self._first is not None else awaited

    def _listen(self, call: _Call) -> None:
        if self._first is None:
            self._first = _at_once(call)


def _at_once(call: _Call) -> grpc.aio.AioRpcError | None:
    """The error of a call that has just ended; later it may be another one."""
    reading = _read(call)
    try:
        # What it awaits is there already, so it runs to its end without the event loop.
        reading.send(None)
    except StopIteration as finished:
        error: grpc.aio.AioRpcError = finished.value
        return error
    reading.close()
    return None


async def _read(call: _Call) -> grpc.aio.AioRpcError:
    return grpc.aio.AioRpcError(
        await call.code(),
        grpc.aio.Metadata(),
        await call.trailing_metadata() or grpc.aio.Metadata(),
        details=await call.details(),
    )
