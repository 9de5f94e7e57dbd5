"""The asyncio client of a gateway: its `Inference` service, and the way to the others."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING

import grpc
import grpc.aio

from lora_gateway._calls import Calls, Metadata
from lora_gateway._channel import open_channel
from lora_gateway.adapters import AdaptersClient
from lora_gateway.admin import AdminClient
from lora_gateway.prompt import ChatTurn, Prompt, chat, prompt_field
from lora_gateway.sampling import SamplingKeywords, sampling_params
from lora_gateway.stream import GenerationStream
from lora_gateway.training import TrainingClient
from lora_gateway.v1.inference_pb2 import (
    GenerateRequest,
    GenerateResponse,
    GetModelRequest,
    Model,
    SamplingParams,
    TokenizeRequest,
    TokenizeResponse,
)
from lora_gateway.v1.inference_pb2_grpc import InferenceStub

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from lora_gateway.v1.inference_pb2_grpc import InferenceAsyncStub

DEFAULT_TIMEOUT_S = 30.0
"""As the server's own default for unary calls."""

DEFAULT_STREAM_TIMEOUT_S = 300.0
"""As the server's own default for streams. Also for calls that wait until work is done."""

DEFAULT_JOB_TIMEOUT_S = 3600.0
"""For uploads, evaluations and reading datasets, which take as long as their data."""


class GatewayClient:
    """One connection to a gateway, for any number of calls at once.

        async with GatewayClient("127.0.0.1:50051") as client:
            answer = await client.generate("Ahoy", adapter="pirate", max_tokens=32)
            print(answer.completions[0].text)

    Keep one and share it: calls run side by side on its connection. Calls that fail with
    UNAVAILABLE before their first token are tried again, four times in all. Every call but a
    watch has a timeout. Every failure is a `GatewayError`.
    """

    def __init__(
        self,
        target: str,
        *,
        tls: grpc.ChannelCredentials | None = None,
        default_timeout_s: float = DEFAULT_TIMEOUT_S,
        default_stream_timeout_s: float = DEFAULT_STREAM_TIMEOUT_S,
        default_job_timeout_s: float = DEFAULT_JOB_TIMEOUT_S,
        metadata: Metadata | None = None,
    ) -> None:
        """Make a client; it connects with its first call.

        Args:
            target: `HOST:PORT`, or any other name that gRPC resolves.
            tls: from `grpc.ssl_channel_credentials`. None: plain text.
            default_timeout_s: for unary calls without a timeout of their own.
            default_stream_timeout_s: for streams without one, from request to last token, and
                for calls that wait until work is done, such as loading an adapter.
            default_job_timeout_s: for uploads, evaluations and what reads datasets, without one.
            metadata: goes with every call.

        Raises:
            RuntimeError: no event loop runs; gRPC binds a channel to the one that does.
        """
        asyncio.get_running_loop()
        self._channel = open_channel(target, tls)
        self._stub: InferenceAsyncStub = InferenceStub(self._channel)
        self._calls = Calls(
            default_timeout_s,
            default_stream_timeout_s,
            default_job_timeout_s,
            dict(metadata or {}),
        )
        self.adapters = AdaptersClient(self._channel, self._calls)
        """Everything about adapters, on the same connection."""
        self.training = TrainingClient(self._channel, self._calls)
        """Everything about datasets and jobs, on the same connection."""
        self.admin = AdminClient(self._channel, self._calls)
        """Shards, for callers on the gateway's machine, on the same connection."""

    async def generate(
        self,
        prompt: Prompt,
        *,
        adapter: str = "",
        version: int | None = None,
        timeout_s: float | None = None,
        session_id: str = "",
        return_token_ids: bool = False,
        metadata: Metadata | None = None,
        sampling: SamplingParams | None = None,
        **sampling_keywords: Unpack[SamplingKeywords],
    ) -> GenerateResponse:
        """Generate and wait for the complete answer.

        Args:
            prompt: text, token ids, or chat turns for the model's chat template.
            adapter: its name. Empty: the base model.
            version: of the adapter. None: the gateway's traffic split decides.
            timeout_s: for the whole call, retries included. None: the client's default.
            session_id: equal ids stay on one version of the adapter.
            return_token_ids: adds the ids of the generated tokens to the answer.
            metadata: goes with this call, for example `traceparent`; wins over the client's.
            sampling: the sampling parameters, or give them as keywords.
            sampling_keywords: fields of `SamplingParams`, for example `max_tokens=32`.

        Raises:
            GatewayError: the call failed; `errors.py` tells how the classes differ.
            TypeError, ValueError: an argument fits into no message; nothing was sent.
        """
        request = GenerateRequest(
            **prompt_field(prompt),
            adapter=adapter,
            version=version,
            sampling=sampling_params(sampling, sampling_keywords),
            return_token_ids=return_token_ids,
            session_id=session_id,
        )
        return await self._calls.unary(self._stub.Generate, request, timeout_s, metadata)

    def stream(
        self,
        prompt: Prompt,
        *,
        adapter: str = "",
        version: int | None = None,
        timeout_s: float | None = None,
        session_id: str = "",
        return_token_ids: bool = False,
        max_tokens_per_chunk: int = 0,
        metadata: Metadata | None = None,
        sampling: SamplingParams | None = None,
        **sampling_keywords: Unpack[SamplingKeywords],
    ) -> GenerationStream:
        """Generate and get the tokens as they come. The call begins now.

        Args:
            max_tokens_per_chunk: tokens gathered before a delta is sent; 0: none.
                The other arguments are those of `generate`.

        Raises:
            TypeError, ValueError: an argument fits into no message; nothing was sent.
                A failed call raises where the stream is read.
        """
        request = GenerateRequest(
            **prompt_field(prompt),
            adapter=adapter,
            version=version,
            sampling=sampling_params(sampling, sampling_keywords),
            return_token_ids=return_token_ids,
            max_tokens_per_chunk=max_tokens_per_chunk,
            session_id=session_id,
        )
        return GenerationStream(
            self._stub.GenerateStream(
                request,
                timeout=self._calls.stream_timeout_s if timeout_s is None else timeout_s,
                metadata=self._calls.merged(metadata),
            )
        )

    async def tokenize(
        self,
        prompt: str | Sequence[ChatTurn],
        *,
        return_tokens: bool = False,
        timeout_s: float | None = None,
        metadata: Metadata | None = None,
    ) -> TokenizeResponse:
        """The token ids of a prompt, exactly as `generate` would render it.

        Args:
            prompt: text, or chat turns for the model's chat template.
            return_tokens: adds the text of each token.
            timeout_s: as for `generate`.
            metadata: as for `generate`.

        Raises:
            GatewayError: the call failed.
            TypeError, ValueError: an argument fits into no message; nothing was sent.
        """
        request = TokenizeRequest(return_tokens=return_tokens)
        if isinstance(prompt, str):
            request.text = prompt
        else:
            request.chat.CopyFrom(chat(prompt))
        return await self._calls.unary(self._stub.Tokenize, request, timeout_s, metadata)

    async def get_model(
        self, *, timeout_s: float | None = None, metadata: Metadata | None = None
    ) -> Model:
        """The base model with the limits, defaults and fingerprints in force.

        Raises:
            GatewayError: the call failed.
        """
        response = await self._calls.unary(
            self._stub.GetModel, GetModelRequest(), timeout_s, metadata
        )
        return response.model

    async def close(self) -> None:
        """Cancel what still runs and disconnect. May be called again."""
        await self._channel.close()

    async def __aenter__(self) -> GatewayClient:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()
