"""What a training process printed, through restarts of the gateway."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

import grpc

from lora_gateway._reconnecting_stream import ReconnectingStream
from lora_gateway.errors import IncompleteStream
from lora_gateway.v1.training_pb2 import GetJobLogsRequest, GetJobLogsResponse

if TYPE_CHECKING:
    import grpc.aio

    _Call: TypeAlias = grpc.aio.UnaryStreamCall[GetJobLogsRequest, GetJobLogsResponse]


class JobLogs(ReconnectingStream[GetJobLogsResponse]):
    """The log of one job, piece by piece, each byte once and in order, for one task to read.

        async for data in client.training.job_logs("support-1f3a", follow=True):
            sys.stdout.buffer.write(data)

    Pieces may end amid a character. Once it has begun, a log that loses the gateway calls again
    until it answers, and goes on at `offset`. Leaving the `async with` block, by whatever way,
    ends the call; so does dropping the last reference.
    """

    def __init__(
        self,
        open_call: Callable[[GetJobLogsRequest], _Call],
        name: str,
        *,
        offset: int,
        follow: bool,
    ) -> None:
        # A training process may print nothing for as long as it likes.
        super().__init__(reconnect=True, silence_limit_s=None)
        self._open_call = open_call
        self._name = name
        self._offset = offset
        self._follow = follow

    @property
    def offset(self) -> int:
        """Of the byte after the last piece, in bytes."""
        return self._offset

    def __aiter__(self) -> JobLogs:
        return self

    async def __anext__(self) -> bytes:
        """The next piece, never empty.

        Raises:
            Unavailable: the gateway was not there to begin with.
            Overloaded: it had no place for one more to begin with.
            NotFound: there is no such job.
            IncompleteStream: bytes are missing; the log is closed.
            GatewayError: the call failed otherwise.
        """
        while (response := await self._receive()) is not None:
            if response.offset > self._offset:
                await self.aclose()
                raise IncompleteStream(
                    f"bytes {self._offset} to {response.offset} of the log of job {self._name!r} "
                    "are missing",
                    code=grpc.StatusCode.DATA_LOSS,
                )
            data = response.data[self._offset - response.offset :]
            if data:
                self._offset += len(data)
                self._backoff.reset()
                return data
        raise StopAsyncIteration

    def _open(self) -> _Call:
        return self._open_call(
            GetJobLogsRequest(name=self._name, offset=self._offset, follow=self._follow)
        )

    async def _is_whole(self) -> bool:
        return True
