"""The events of a job as they happen, through restarts of the gateway."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, TypeAlias

import grpc

from lora_gateway._reconnecting_stream import ReconnectingStream
from lora_gateway.errors import IncompleteStream
from lora_gateway.v1.training_pb2 import (
    Job,
    JobEvent,
    JobState,
    WatchJobRequest,
    WatchJobResponse,
)

if TYPE_CHECKING:
    import grpc.aio

    _Call: TypeAlias = grpc.aio.UnaryStreamCall[WatchJobRequest, WatchJobResponse]

SILENCE_LIMIT_S = 60.0
"""Without a word for so long the gateway is lost: it sends a heartbeat every 10 s."""

FINAL_STATES = frozenset(
    (JobState.JOB_STATE_SUCCEEDED, JobState.JOB_STATE_CANCELLED, JobState.JOB_STATE_FAILED)
)


class JobWatch(ReconnectingStream[WatchJobResponse]):
    """Events of one job, each once, in order and without a gap, for one task to read.

        async for event in client.training.watch_job("support-1f3a"):
            print(event.sequence, event.WhichOneof("payload"))

    It ends when the job has. Once it has begun, a watch that loses the gateway calls again until
    it answers, and goes on behind the last event. Leaving the `async with` block, by whatever
    way, ends the call; so does dropping the last reference.
    """

    def __init__(
        self,
        open_call: Callable[[WatchJobRequest], _Call],
        get_job: Callable[[], Awaitable[Job]],
        name: str,
        *,
        after_sequence: int,
        reconnect: bool,
        silence_limit_s: float = SILENCE_LIMIT_S,
    ) -> None:
        super().__init__(reconnect=reconnect, silence_limit_s=silence_limit_s)
        self._open_call = open_call
        self._get_job = get_job
        self._name = name
        self._sequence = after_sequence
        self._state: JobState.ValueType | None = None

    @property
    def sequence(self) -> int:
        """Where the watch stands: give it as `after_sequence` to another one to go on."""
        return self._sequence

    @property
    def state(self) -> JobState.ValueType | None:
        """The job's state as told last. None: nothing was told yet."""
        return self._state

    def __aiter__(self) -> JobWatch:
        return self

    async def __anext__(self) -> JobEvent:
        """The next event, however long it takes to come.

        Cancelling this loses no event: the next call of it goes on behind the last one.

        Raises:
            Unavailable: the gateway was not there to begin with, or it is gone and `reconnect`
                is off.
            Overloaded: the same, but that it has no place for one more.
            NotFound: there is no such job, or it was deleted meanwhile.
            IncompleteStream: events are missing; the watch is closed.
            GatewayError: the call failed otherwise, for example with reason SEQUENCE_UNKNOWN.
        """
        while (response := await self._receive()) is not None:
            event = await self._event_in(response)
            if event is not None:
                return event
        raise StopAsyncIteration

    def _open(self) -> _Call:
        return self._open_call(WatchJobRequest(name=self._name, after_sequence=self._sequence))

    async def _is_whole(self) -> bool:
        if self._state in FINAL_STATES:
            return True
        # Who goes on behind the last event is told nothing at all.
        job = await self._get_job()
        if job.state not in FINAL_STATES or job.last_sequence > self._sequence:
            return False
        self._state = job.state
        return True

    async def _event_in(self, response: WatchJobResponse) -> JobEvent | None:
        """The event that the message tells, if it does and it was not told before."""
        match response.WhichOneof("item"):
            case "event" if response.event.sequence > self._sequence:
                event = response.event
                await self._require(event.sequence - 1)
                self._sequence = event.sequence
                if event.WhichOneof("payload") == "state_changed":
                    self._state = event.state_changed.state
                self._backoff.reset()
                return event
            case "heartbeat":
                await self._require(response.heartbeat.sequence)
                self._state = response.heartbeat.state
        return None

    async def _require(self, sequence: int) -> None:
        """Raises IncompleteStream unless all events up to `sequence` have been told."""
        if sequence > self._sequence:
            await self.aclose()
            raise IncompleteStream(
                f"events {self._sequence + 1} to {sequence} of job {self._name!r} are missing; "
                f"watch again after {self._sequence}",
                code=grpc.StatusCode.DATA_LOSS,
            )
