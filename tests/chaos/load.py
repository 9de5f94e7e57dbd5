"""The load: clients that call again and again, each on a connection of its own."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import AsyncIterator, Sequence

import grpc

from lora_gateway.v1 import inference_pb2 as pb
from lora_gateway.v1.inference_pb2_grpc import InferenceStub
from tests.chaos.call import OK, CallRecord
from tests.details import DETAILS_KEY, error_info

PROMPT = "Once upon a time"
DEADLINE_S = 60.0
"""Of each call. One that waits for a core that hangs ends long before."""
TOKENS = (24, 48)
"""Asked for in turns: each length has a golden answer."""
PAUSE_S = 0.1
"""Between the calls of a client, so that engines have the machine for themselves at times: they
start again under this load."""
RETRY_PAUSE_S = 0.3
"""After a failure, as a client that retries does."""
OPTIONS = [
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 500),
]


def request(adapter: str, tokens: int) -> pb.GenerateRequest:
    """Greedy, and of exactly so many tokens."""
    return pb.GenerateRequest(
        text=PROMPT,
        adapter=adapter,
        return_token_ids=True,
        sampling=pb.SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True),
    )


class Load:
    """Clients of one gateway, which take the adapters in turns; unary calls and streams."""

    def __init__(self, address: str, adapters: Sequence[str], clients: int) -> None:
        self.calls: list[CallRecord] = []
        """All of them, those that run too."""
        self.address = address
        self.adapters = adapters
        self._clients = clients
        self._turn = itertools.count()

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Load until the end of the block, which waits for the calls that run."""
        stop = asyncio.Event()
        async with asyncio.TaskGroup() as clients:
            for _ in range(self._clients):
                clients.create_task(self._client(stop))
            try:
                yield
            finally:
                stop.set()

    async def _client(self, stop: asyncio.Event) -> None:
        async with grpc.aio.insecure_channel(self.address, options=OPTIONS) as channel:
            while not stop.is_set():
                turn = next(self._turn)
                adapter = self.adapters[turn % len(self.adapters)]
                # By another count than the adapters, so that each has all.
                tokens = TOKENS[turn // len(self.adapters) % len(TOKENS)]
                call = await self.call(channel, adapter, tokens, stream=turn % 3 != 0)
                await asyncio.sleep(PAUSE_S if call.code == OK else RETRY_PAUSE_S)

    async def call(
        self, channel: grpc.aio.Channel, adapter: str, tokens: int, *, stream: bool
    ) -> CallRecord:
        """One call, to its end."""
        call = CallRecord(adapter, stream, tokens, DEADLINE_S, time.monotonic())
        self.calls.append(call)
        try:
            # A deadline that gRPC does not keep is a finding, and must not stop us.
            async with asyncio.timeout(DEADLINE_S + 10):
                await (_stream if stream else _unary)(channel, call)
        except grpc.aio.AioRpcError as error:
            call.code = error.code().name
            if any(key == DETAILS_KEY for key, _ in error.trailing_metadata() or ()):
                call.reason = error_info(error).reason
        except TimeoutError:
            return call  # it has not ended
        else:
            call.code = OK
        call.ended_s = time.monotonic()
        return call


async def _unary(channel: grpc.aio.Channel, call: CallRecord) -> None:
    answer = await InferenceStub(channel).Generate(
        request(call.adapter, call.asked_tokens), timeout=call.deadline_s
    )
    (completion,) = answer.completions
    call.text = completion.text
    call.tokens = len(completion.token_ids)
    call.finished = completion.finish_reason == pb.FINISH_REASON_LENGTH


async def _stream(channel: grpc.aio.Channel, call: CallRecord) -> None:
    events = InferenceStub(channel).GenerateStream(
        request(call.adapter, call.asked_tokens), timeout=call.deadline_s
    )
    async for event in events:
        call.text += event.delta.text
        call.tokens += len(event.delta.token_ids)
        ends = event.finished.completions
        call.finished = bool(ends) and ends[0].finish_reason == pb.FINISH_REASON_LENGTH
