"""An honest fake of the Inference service: it echoes prompts, and fails as it is told to.

It speaks real gRPC from a real server; only the engine behind it is missing.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, TypeAlias

import grpc
import grpc.aio
from google.rpc import status_pb2
from grpc_status import rpc_status

from lora_gateway.v1 import inference_pb2 as pb
from lora_gateway.v1.inference_pb2_grpc import (
    InferenceServicer,
    add_InferenceServicer_to_server,
)

Context: TypeAlias = Any  # what the generated stubs call it, `_ServicerContext`, is private
Cut: TypeAlias = status_pb2.Status | None

REQUEST_ID = "request-1"
UNAVAILABLE = status_pb2.Status(code=grpc.StatusCode.UNAVAILABLE.value[0], message="not now")


class FakeInference(InferenceServicer):
    """Answers a prompt with its own words, one token each."""

    def __init__(self) -> None:
        self.requests: list[pb.GenerateRequest] = []
        """Every attempt that arrived, failed ones too."""
        self.metadata: dict[str, str | bytes] = {}
        """Of the last attempt."""
        self.time_remaining_s = 0.0
        """Until the deadline of the last attempt, when it arrived."""
        self.failures: deque[status_pb2.Status] = deque()
        """Each next attempt takes one and fails with it, before its first token."""
        self.cuts: deque[Cut] = deque()
        """Each next stream takes one and ends with it after its first token; None: in order,
        yet without `finished`."""
        self.hangs = False
        """Streams wait after their first token for somebody to cancel them."""
        self.cancelled = asyncio.Event()
        """A stream that hung was cancelled."""
        self.model = pb.Model(base_model="tiny", limits=pb.ModelLimits(max_model_len=2048))

    async def Generate(self, request: pb.GenerateRequest, context: Context) -> pb.GenerateResponse:
        await self._arrive(request, context)
        words = _words(request)
        return pb.GenerateResponse(
            request_id=REQUEST_ID,
            completions=[pb.Completion(text="".join(words), finish_reason=pb.FINISH_REASON_STOP)],
            usage=pb.Usage(prompt_tokens=len(words), completion_tokens=len(words)),
            served_by=_served_by(request),
        )

    async def GenerateStream(
        self, request: pb.GenerateRequest, context: Context
    ) -> AsyncIterator[pb.GenerateStreamResponse]:
        await self._arrive(request, context)
        if self.hangs:  # not by the generator's end: nobody closes it after a write was cancelled
            context.add_done_callback(lambda _: self.cancelled.set())
        words = _words(request)
        yield pb.GenerateStreamResponse(
            started=pb.GenerationStarted(request_id=REQUEST_ID, served_by=_served_by(request))
        )
        for word in words:
            yield pb.GenerateStreamResponse(delta=pb.GenerationDelta(text=word))
            if self.hangs:
                await asyncio.Event().wait()
            if self.cuts:
                cut = self.cuts.popleft()
                if cut is None:
                    return
                await context.abort_with_status(rpc_status.to_status(cut))
        yield pb.GenerateStreamResponse(
            finished=pb.GenerationFinished(
                completions=[pb.CompletionEnd(finish_reason=pb.FINISH_REASON_STOP)],
                usage=pb.Usage(prompt_tokens=len(words), completion_tokens=len(words)),
                timings=pb.Timings(time_to_first_token_ms=1.5, total_ms=3),
            )
        )

    async def Tokenize(self, request: pb.TokenizeRequest, context: Context) -> pb.TokenizeResponse:
        text = request.text or request.chat.messages[-1].content
        return pb.TokenizeResponse(
            token_ids=range(len(text.split())), tokens=text.split() if request.return_tokens else []
        )

    async def GetModel(self, request: pb.GetModelRequest, context: Context) -> pb.GetModelResponse:
        return pb.GetModelResponse(model=self.model)

    async def _arrive(self, request: pb.GenerateRequest, context: Context) -> None:
        self.requests.append(request)
        self.metadata = dict(context.invocation_metadata())
        self.time_remaining_s = context.time_remaining()
        if self.failures:
            await context.abort_with_status(rpc_status.to_status(self.failures.popleft()))


@asynccontextmanager
async def served(
    inference: FakeInference, tls: grpc.ServerCredentials | None = None
) -> AsyncIterator[str]:
    """Serve on a free port of the loopback; gives the target."""
    server = grpc.aio.server()
    add_InferenceServicer_to_server(inference, server)
    address = "127.0.0.1:0"
    port = server.add_secure_port(address, tls) if tls else server.add_insecure_port(address)
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(grace=None)


def _words(request: pb.GenerateRequest) -> list[str]:
    match request.WhichOneof("prompt"):
        case "chat":
            text = request.chat.messages[-1].content
        case "token_ids":
            text = " ".join(map(str, request.token_ids.ids))
        case _:
            text = request.text
    return [word if i == 0 else f" {word}" for i, word in enumerate(text.split())]


def _served_by(request: pb.GenerateRequest) -> pb.ServedBy:
    version = request.version or 1 if request.adapter else 0
    return pb.ServedBy(adapter=request.adapter, version=version, shard="shard-0")
