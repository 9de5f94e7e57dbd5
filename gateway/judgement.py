"""How versions do on live traffic: comparison, feedback, and the guard that rolls back."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable

from engine.errors import Violation
from engine.generation import VersionKey
from engine.ledger import Ledger
from gateway import adapter_codec as codec
from gateway.arms import Arms
from gateway.comparison import ArmDifference, ArmReport, Quantiles, compare
from gateway.exceptions import RequestNotFound
from gateway.guard import breach
from gateway.processes import Processes
from lora_gateway.v1 import adapters_pb2 as pb
from store.records import AdapterRecord, EtagMismatch, NothingToRollBack
from store.registry import Registry

logger = logging.getLogger(__name__)

GUARD_INTERVAL_S = 1.0
GUARD = "guard"
"""Actor of what the guard does."""
MAX_COMPARED = 16
DEFAULT_CONFIDENCE = 0.95


class Judgement:
    """Judges arms by the requests that they answered."""

    def __init__(
        self,
        registry: Registry,
        ledger: Ledger,
        arms: Arms,
        processes: Processes,
        quarantined: Callable[[VersionKey], bool],
    ) -> None:
        """`quarantined` tells whether all requests of a version are refused."""
        self._registry = registry
        self._ledger = ledger
        self._arms = arms
        self._processes = processes
        self._quarantined = quarantined

    async def compare(
        self, request: pb.CompareVersionsRequest, tenant: str
    ) -> pb.CompareVersionsResponse:
        """How versions of one adapter did, and how they differ."""
        confidence = _decode_compare(request)
        record = await self._registry.adapter(tenant, request.adapter)
        await self._processes.flush()
        versions = list(request.versions) or self._answering(record)
        for version in versions:
            await self._registry.version(tenant, request.adapter, version)
        since_s = record.traffic_time_ns / 1e9
        if request.window_s:
            since_s = time.time() - request.window_s
        since_s = max(since_s, self._arms.since_s)
        outcomes = {
            version: self._arms.outcomes(tenant, request.adapter, version, since_s)
            for version in versions
        }
        feedback = await self._registry.feedback(tenant, request.adapter)
        # Resampling takes a tenth of a second, and others are served meanwhile.
        comparison = await asyncio.to_thread(compare, outcomes, feedback, confidence)
        return pb.CompareVersionsResponse(
            arms=[_encode_arm(arm) for arm in comparison.arms],
            differences=[_encode_difference(d) for d in comparison.differences],
            since=codec.encode_time(int(since_s * 1e9)),
        )

    def _answering(self, record: AdapterRecord) -> list[int]:
        """Versions that have answered, the one with most traffic first."""
        weights = {arm.version: arm.weight for arm in record.arms}
        versions = {*weights, *self._arms.versions(record.tenant, record.adapter)}
        ordered = sorted(versions, key=lambda version: (-weights.get(version, 0), version))
        return ordered[:MAX_COMPARED]

    async def record_feedback(
        self, request: pb.RecordFeedbackRequest, tenant: str
    ) -> pb.RecordFeedbackResponse:
        """Score the answer to one request."""
        wrong = []
        if not request.request_id:
            wrong.append(Violation("request_id", "is required; each answer comes with one"))
        if not request.HasField("score") or not math.isfinite(request.score):
            wrong.append(Violation("score", "is required, as a finite number"))
        codec.refuse(wrong)
        arm = self._arms.arm_of(tenant, request.request_id)
        if arm is None:
            await self._processes.flush()  # it may have ended just now
            arm = self._arms.arm_of(tenant, request.request_id)
        if arm is None:
            raise RequestNotFound(request.request_id)
        adapter, version = arm
        await self._registry.record_feedback(
            tenant, adapter, version, request.request_id, request.score
        )
        return pb.RecordFeedbackResponse(adapter=adapter, version=version)

    async def guard(self) -> None:
        """Once a second, roll back what breaches its limits. Until cancelled."""
        while True:
            await asyncio.sleep(GUARD_INTERVAL_S)
            for record in list(self._ledger.guarded.values()):
                await asyncio.sleep(0)  # others run in between
                try:
                    await self._guard(record)
                except Exception:  # of one adapter; the others are guarded on
                    logger.exception("cannot guard adapter %s", record.adapter)

    async def _guard(self, record: AdapterRecord) -> None:
        assert record.guard is not None
        outcomes = self._arms.outcomes(
            record.tenant, record.adapter, record.guard.version, record.traffic_time_ns / 1e9
        )
        reason = breach(record.guard, outcomes)
        if self._quarantined(VersionKey(record.tenant, record.adapter, record.guard.version)):
            reason = "an engine crashed twice on its requests, and it is quarantined"
        if reason is None:
            return
        logger.warning("adapter %s is rolled back by its guard: %s", record.adapter, reason)
        try:
            await self._ledger.roll_back(
                record.tenant, record.adapter, etag=record.etag, actor=GUARD, reason=reason
            )
        except EtagMismatch:
            pass  # somebody was faster
        except NothingToRollBack as error:
            logger.error("%s", error)
            self._ledger.guarded.pop((record.tenant, record.adapter), None)


def _decode_compare(request: pb.CompareVersionsRequest) -> float:
    wrong = list(codec.name_violations(request.adapter))
    versions = list(request.versions)
    if len(versions) > MAX_COMPARED or len(set(versions)) != len(versions):
        wrong.append(Violation("versions", f"may have {MAX_COMPARED} entries, all different"))
    confidence = request.confidence if request.HasField("confidence") else DEFAULT_CONFIDENCE
    if not 0 < confidence < 1:
        wrong.append(Violation("confidence", "must be above 0 and below 1"))
    codec.refuse(wrong)
    return confidence


def _encode_arm(arm: ArmReport) -> pb.ArmReport:
    return pb.ArmReport(
        version=arm.version,
        request_count=arm.request_count,
        codes=arm.codes,
        finish_reasons=arm.finish_reasons,
        ttft_ms=_encode_quantiles(arm.ttft_ms),
        inter_token_ms=_encode_quantiles(arm.inter_token_ms),
        total_ms=_encode_quantiles(arm.total_ms),
        completion_tokens=_encode_quantiles(arm.completion_tokens),
        prompt_tokens_total=arm.prompt_tokens_total,
        completion_tokens_total=arm.completion_tokens_total,
        feedback=pb.FeedbackReport(
            count=arm.feedback.count,
            mean=arm.feedback.mean,
            standard_deviation=arm.feedback.standard_deviation,
        ),
    )


def _encode_quantiles(quantiles: Quantiles) -> pb.Quantiles:
    return pb.Quantiles(
        count=quantiles.count,
        mean=quantiles.mean,
        p50=quantiles.p50,
        p90=quantiles.p90,
        p95=quantiles.p95,
        p99=quantiles.p99,
    )


def _encode_difference(difference: ArmDifference) -> pb.ArmDifference:
    return pb.ArmDifference(
        version=difference.version,
        measure=difference.measure,
        difference=difference.difference,
        low=difference.low,
        high=difference.high,
        significant=difference.significant,
    )
