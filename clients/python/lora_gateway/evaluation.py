"""The answers and scores of one evaluation as they come."""

from __future__ import annotations

from typing import TypeAlias

import grpc

from lora_gateway._server_stream import ServerStream
from lora_gateway.errors import IncompleteStream
from lora_gateway.v1.adapters_pb2 import (
    EvaluateVersionRequest,
    EvaluateVersionResponse,
    EvaluationProgress,
    EvaluationResult,
    EvaluationSummary,
)

EvaluationEvent: TypeAlias = EvaluationProgress | EvaluationResult | EvaluationSummary
"""One event: progress and results as they come, the summary once and last."""


class Evaluation(ServerStream[EvaluateVersionRequest, EvaluateVersionResponse]):
    """Events of one `EvaluateVersion` call, in order, for one task to read.

        async with client.adapters.evaluate("pirate", [1, 2], examples=examples) as evaluation:
            async for event in evaluation:
                if isinstance(event, EvaluationProgress):
                    print(f"{event.done} of {event.total}")
        print(evaluation.summary.differences)

    Leaving the `async with` block, by whatever way, ends the evaluation.
    """

    _summary: EvaluationSummary | None = None

    @property
    def summary(self) -> EvaluationSummary:
        """The event that closed the evaluation: mean scores, and how the versions differ.

        Raises:
            RuntimeError: it was not read yet.
        """
        if self._summary is None:
            raise RuntimeError("the evaluation has not been read to its end")
        return self._summary

    def __aiter__(self) -> Evaluation:
        return self

    async def __anext__(self) -> EvaluationEvent:
        """The next event.

        Raises:
            GatewayError: the call failed; `errors.py` tells how the classes differ.
            IncompleteStream: the call ended in order, but without a summary.
        """
        while not self._closed:
            response = await self._read()
            if response is None:
                self._require_summary()
                break
            match response.WhichOneof("event"):
                case "progress":
                    return response.progress
                case "result":
                    return response.result
                case "summary":
                    self._summary = response.summary
                    return response.summary
                case None:
                    continue  # a kind of event that is newer than this client
        raise StopAsyncIteration

    def _require_summary(self) -> None:
        if self._summary is None:
            raise IncompleteStream(
                "the evaluation ended without `summary`: its scores are incomplete",
                code=grpc.StatusCode.DATA_LOSS,
            )
