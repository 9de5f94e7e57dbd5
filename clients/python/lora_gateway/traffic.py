"""Which versions of an adapter answer, and how well they do: half of `AdaptersClient`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from lora_gateway._calls import Calls, Metadata
from lora_gateway.evaluation import Evaluation
from lora_gateway.v1.adapters_pb2 import (
    Adapter,
    CompareVersionsRequest,
    CompareVersionsResponse,
    EvaluateVersionRequest,
    EvaluationExample,
    PromoteVersionRequest,
    RecordFeedbackRequest,
    RecordFeedbackResponse,
    RollbackAdapterRequest,
    Scorer,
    SetTrafficRequest,
    TrafficGuard,
    TrafficSplit,
)

if TYPE_CHECKING:
    from lora_gateway.v1.adapters_pb2_grpc import AdaptersAsyncStub


class TrafficCalls:
    """The calls that move traffic and judge versions. Use them on `GatewayClient.adapters`."""

    def __init__(self, stub: AdaptersAsyncStub, calls: Calls) -> None:
        self._stub = stub
        self._calls = calls

    async def set_traffic(
        self,
        adapter: str,
        splits: Mapping[int, int],
        *,
        etag: str = "",
        guard: TrafficGuard | None = None,
        timeout_s: float | None = None,
        metadata: Metadata | None = None,
    ) -> Adapter:
        """Split an adapter's traffic; answers once every worker follows.

        Args:
            splits: weight by version. Empty: no version gets traffic.
            etag: of the Adapter that this builds on. Empty: whatever stands is replaced.
            guard: rolls the split back when its version does badly. None: nobody does.

        Raises:
            Conflict: the adapter changed since the etag was read.
            GatewayError: the call failed otherwise. If it is Unavailable, look with `get`
                whether the split was set.
        """
        request = SetTrafficRequest(
            adapter=adapter,
            splits=[
                TrafficSplit(version=version, weight=weight) for version, weight in splits.items()
            ],
            etag=etag,
            guard=guard,
        )
        response = await self._calls.unary(self._stub.SetTraffic, request, timeout_s, metadata)
        return response.adapter

    async def promote(
        self,
        adapter: str,
        version: int,
        *,
        etag: str = "",
        timeout_s: float | None = None,
        metadata: Metadata | None = None,
    ) -> Adapter:
        """Give one READY version all traffic. Arguments and errors as for `set_traffic`."""
        request = PromoteVersionRequest(adapter=adapter, version=version, etag=etag)
        method = self._stub.PromoteVersion
        return (await self._calls.unary(method, request, timeout_s, metadata)).adapter

    async def rollback(
        self,
        adapter: str,
        *,
        etag: str = "",
        timeout_s: float | None = None,
        metadata: Metadata | None = None,
    ) -> Adapter:
        """Restore the split before the last change; called again it goes back one more.

        Arguments and errors as for `set_traffic`.
        """
        request = RollbackAdapterRequest(adapter=adapter, etag=etag)
        method = self._stub.RollbackAdapter
        return (await self._calls.unary(method, request, timeout_s, metadata)).adapter

    async def compare(
        self,
        adapter: str,
        *,
        versions: Sequence[int] = (),
        window_s: int = 0,
        confidence: float | None = None,
        timeout_s: float | None = None,
        metadata: Metadata | None = None,
    ) -> CompareVersionsResponse:
        """How versions did on live traffic, and how they differ from the first one.

        Args:
            versions: the first is the baseline. Empty: all that have answered.
            window_s: looks at so many last seconds. 0: since the split was last changed.
            confidence: of the intervals, above 0 and below 1. None: 0.95.
        """
        request = CompareVersionsRequest(
            adapter=adapter, versions=versions, window_s=window_s, confidence=confidence
        )
        return await self._calls.unary(self._stub.CompareVersions, request, timeout_s, metadata)

    def evaluate(
        self,
        adapter: str,
        versions: Sequence[int],
        *,
        examples: Sequence[EvaluationExample] = (),
        dataset_uri: str = "",
        scorers: Sequence[Scorer.ValueType] = (),
        max_tokens: int = 0,
        max_concurrency: int = 0,
        return_results: bool = False,
        timeout_s: float | None = None,
        metadata: Metadata | None = None,
    ) -> Evaluation:
        """Run a held-out set through versions and score the answers. The call begins now.

        Args:
            versions: READY ones; 0 is the base model. The first is the baseline.
            examples: the set; at most 8 MiB, or else `dataset_uri`.
            dataset_uri: JSON Lines of examples that the gateway can read, instead.
            scorers: to apply. Empty: all for which the examples have what they need.
            max_tokens: of each answer. 0: the gateway's default, like `max_concurrency`.
            max_concurrency: the most answers generated at once.
            return_results: stream each answer with its scores.

        Raises:
            TypeError, ValueError: an argument fits into no message; nothing was sent.
                A failed call raises where the evaluation is read.
        """
        request = EvaluateVersionRequest(
            adapter=adapter,
            versions=versions,
            examples=examples,
            dataset_uri=dataset_uri,
            scorers=scorers,
            max_tokens=max_tokens,
            max_concurrency=max_concurrency,
            return_results=return_results,
        )
        return Evaluation(
            self._stub.EvaluateVersion(
                request,
                timeout=self._calls.job_timeout_s if timeout_s is None else timeout_s,
                metadata=self._calls.merged(metadata),
            )
        )

    async def record_feedback(
        self,
        request_id: str,
        score: float,
        *,
        timeout_s: float | None = None,
        metadata: Metadata | None = None,
    ) -> RecordFeedbackResponse:
        """Score the answer to one request, for `compare`; again replaces the score.

        Args:
            request_id: that the answer came with.
            score: higher is better; any scale that is kept to.
        """
        request = RecordFeedbackRequest(request_id=request_id, score=score)
        return await self._calls.unary(self._stub.RecordFeedback, request, timeout_s, metadata)
