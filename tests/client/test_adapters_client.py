"""The client of adapters against a real gRPC server on the loopback."""

from __future__ import annotations

from collections.abc import AsyncIterator

import grpc
import pytest

from lora_gateway import (
    AdapterVersion,
    CompareVersionsResponse,
    Conflict,
    ErrorReason,
    EvaluationExample,
    EvaluationProgress,
    EvaluationResult,
    EvaluationSummary,
    FailedPrecondition,
    GatewayClient,
    GatewayError,
    IncompleteStream,
    ModelFingerprints,
    NotFound,
    PermissionDenied,
    Scorer,
    TrafficGuard,
    TrafficSplit,
    Unavailable,
    VersionScore,
    VersionState,
)
from lora_gateway.v1 import adapters_pb2 as pb
from tests.client.fake_adapters import UNAVAILABLE, FakeAdapters, refusal, served

SLACK_S = 5.0
FINGERPRINTS = ModelFingerprints(weights_sha256="w" * 64)


@pytest.fixture
def adapters() -> FakeAdapters:
    return FakeAdapters()


@pytest.fixture
async def client(adapters: FakeAdapters) -> AsyncIterator[GatewayClient]:
    async with served(adapters) as target, GatewayClient(target) as client:
        yield client


# --- taking in


async def test_validate_tells_facts_or_findings(
    client: GatewayClient, adapters: FakeAdapters
) -> None:
    good = await client.adapters.validate(
        "/adapters/pirate", expected_sha256="a" * 64, fingerprints=FINGERPRINTS
    )
    bad = await client.adapters.validate("/adapters/broken")

    assert good.valid
    assert good.facts.rank == 8
    assert not bad.valid
    assert bad.findings == ["rank 512 is above 64; train with less"]
    assert adapters.requests[0] == pb.ValidateAdapterRequest(
        source_uri="/adapters/pirate", expected_sha256="a" * 64, fingerprints=FINGERPRINTS
    )


async def test_create_sends_every_field_and_returns_the_version(
    client: GatewayClient, adapters: FakeAdapters
) -> None:
    version = await client.adapters.create(
        "pirate",
        "/adapters/pirate",
        expected_sha256="a" * 64,
        labels={"team": "search"},
        wait=True,
        no_traffic=True,
        fingerprints=FINGERPRINTS,
        request_id="mine",
    )

    assert isinstance(version, AdapterVersion)
    assert (version.adapter, version.version) == ("pirate", 1)
    assert version.state == VersionState.VERSION_STATE_READY
    assert adapters.requests == [
        pb.CreateAdapterVersionRequest(
            request_id="mine",
            adapter="pirate",
            source_uri="/adapters/pirate",
            expected_sha256="a" * 64,
            labels={"team": "search"},
            wait=True,
            no_traffic=True,
            fingerprints=FINGERPRINTS,
        )
    ]


async def test_a_create_that_is_tried_again_makes_one_version(
    client: GatewayClient, adapters: FakeAdapters
) -> None:
    adapters.failures.append(UNAVAILABLE)
    assert (await client.adapters.create("pirate", "/pirate")).version == 1
    first, second = adapters.requests
    assert isinstance(first, pb.CreateAdapterVersionRequest)
    assert first == second
    assert first.request_id

    assert (await client.adapters.create("pirate", "/pirate")).version == 2


# --- looking


async def test_get_and_get_version_return_what_is_there(
    client: GatewayClient, adapters: FakeAdapters
) -> None:
    await adapters.add("pirate")
    adapter = await client.adapters.get("pirate")
    assert adapter.splits == [TrafficSplit(version=1, weight=1)]
    assert (await client.adapters.get_version("pirate", 1)).rank == 8


async def test_list_goes_over_all_pages_in_order(
    client: GatewayClient, adapters: FakeAdapters
) -> None:
    for name in ("a3", "a1", "b1", "a2"):
        await adapters.add(name)

    names = [found.adapter async for found in client.adapters.list(prefix="a", page_size=2)]
    assert names == ["a1", "a2", "a3"]
    assert adapters.requests == [
        pb.ListAdaptersRequest(prefix="a", page_size=2),
        pb.ListAdaptersRequest(prefix="a", page_size=2, page_token="2"),
    ]


async def test_list_asks_for_no_page_that_nobody_reads(
    client: GatewayClient, adapters: FakeAdapters
) -> None:
    for name in ("a", "b", "c"):
        await adapters.add(name)
    async for found in client.adapters.list(page_size=1):
        assert found.adapter == "a"
        break
    assert len(adapters.requests) == 1


async def test_list_versions_is_newest_first_and_hides_deleted_ones(
    client: GatewayClient, adapters: FakeAdapters
) -> None:
    for _ in range(3):
        await adapters.add("pirate")
    await client.adapters.delete("pirate", 2)

    async def numbers(show_deleted: bool) -> list[int]:
        versions = client.adapters.list_versions("pirate", show_deleted=show_deleted, page_size=2)
        return [version.version async for version in versions]

    assert await numbers(False) == [3, 1]
    assert await numbers(True) == [3, 2, 1]


# --- traffic


async def test_traffic_is_set_promoted_and_rolled_back(
    client: GatewayClient, adapters: FakeAdapters
) -> None:
    for _ in range(2):
        await adapters.add("pirate")
    guard = TrafficGuard(version=2, max_error_ratio=0.1)

    split = await client.adapters.set_traffic("pirate", {1: 90, 2: 10}, etag="t1", guard=guard)
    assert [(arm.version, arm.weight) for arm in split.splits] == [(1, 90), (2, 10)]
    assert split.guard == guard
    assert adapters.requests[-1] == pb.SetTrafficRequest(
        adapter="pirate",
        splits=[TrafficSplit(version=1, weight=90), TrafficSplit(version=2, weight=10)],
        etag="t1",
        guard=guard,
    )

    promoted = await client.adapters.promote("pirate", 2, etag=split.etag)
    assert promoted.splits == [TrafficSplit(version=2, weight=1)]
    restored = await client.adapters.rollback("pirate", etag=promoted.etag)
    assert restored.splits == split.splits
    assert [getattr(request, "etag", "") for request in adapters.requests[-2:]] == [
        split.etag,
        promoted.etag,
    ]


async def test_an_etag_that_is_old_is_a_conflict(
    client: GatewayClient, adapters: FakeAdapters
) -> None:
    await adapters.add("pirate")
    with pytest.raises(Conflict) as raised:
        await client.adapters.set_traffic("pirate", {1: 1}, etag="t0")
    assert raised.value.reason == ErrorReason.ERROR_REASON_ETAG_MISMATCH


async def test_what_moves_traffic_is_not_tried_again(
    client: GatewayClient, adapters: FakeAdapters
) -> None:
    await adapters.add("pirate")
    for call in (
        client.adapters.set_traffic("pirate", {1: 1}),
        client.adapters.promote("pirate", 1),
        client.adapters.rollback("pirate"),
    ):
        adapters.failures.append(UNAVAILABLE)
        with pytest.raises(Unavailable):
            await call
    assert len(adapters.requests) == 3


async def test_a_weight_that_fits_no_message_is_refused_unsent(
    client: GatewayClient, adapters: FakeAdapters
) -> None:
    with pytest.raises(ValueError, match="out of range"):
        await client.adapters.set_traffic("pirate", {1: -1})
    assert not adapters.requests


# --- judging


async def test_compare_sends_its_arms_and_returns_the_report(
    client: GatewayClient, adapters: FakeAdapters
) -> None:
    adapters.comparison = CompareVersionsResponse(arms=[pb.ArmReport(version=2)])
    report = await client.adapters.compare("pirate", versions=[2, 1], window_s=60, confidence=0.9)
    assert report == adapters.comparison
    assert adapters.requests == [
        pb.CompareVersionsRequest(adapter="pirate", versions=[2, 1], window_s=60, confidence=0.9)
    ]


async def test_an_evaluation_yields_typed_events_and_keeps_the_summary(
    client: GatewayClient, adapters: FakeAdapters
) -> None:
    adapters.summary = EvaluationSummary(scores=[VersionScore(version=1, mean=0.5)])
    examples = [EvaluationExample(text="ahoy", contains=["matey"])]
    async with client.adapters.evaluate(
        "pirate",
        [1, 0],
        examples=examples,
        scorers=[Scorer.SCORER_CONTAINS],
        max_tokens=8,
        max_concurrency=2,
        return_results=True,
    ) as evaluation:
        with pytest.raises(RuntimeError, match="not been read to its end"):
            _ = evaluation.summary
        events = [event async for event in evaluation]

    assert [type(event) for event in events] == [
        *(EvaluationResult, EvaluationProgress) * 2,
        EvaluationSummary,
    ]
    assert evaluation.summary == adapters.summary
    assert adapters.requests == [
        pb.EvaluateVersionRequest(
            adapter="pirate",
            versions=[1, 0],
            examples=examples,
            scorers=[Scorer.SCORER_CONTAINS],
            max_tokens=8,
            max_concurrency=2,
            return_results=True,
        )
    ]


async def test_an_evaluation_without_summary_is_incomplete(
    client: GatewayClient, adapters: FakeAdapters
) -> None:
    adapters.evaluation_cut = True
    evaluation = client.adapters.evaluate("pirate", [1], examples=[EvaluationExample(text="ahoy")])
    assert isinstance(await anext(evaluation), EvaluationProgress)
    with pytest.raises(IncompleteStream) as raised:
        await anext(evaluation)
    assert raised.value.code is grpc.StatusCode.DATA_LOSS


async def test_an_evaluation_that_fails_raises_where_it_is_read(
    client: GatewayClient, adapters: FakeAdapters
) -> None:
    text = "version 2 is FAILED"
    adapters.failures.append(
        refusal(grpc.StatusCode.FAILED_PRECONDITION, "ADAPTER_NOT_READY", text)
    )
    async with client.adapters.evaluate("pirate", [2], dataset_uri="/data.jsonl") as evaluation:
        with pytest.raises(FailedPrecondition, match=text):
            await anext(evaluation)


async def test_feedback_is_sent_with_a_score_of_zero_too(
    client: GatewayClient, adapters: FakeAdapters
) -> None:
    arm = await client.adapters.record_feedback("request-1", 0)
    assert (arm.adapter, arm.version) == ("pirate", 2)
    assert adapters.requests == [pb.RecordFeedbackRequest(request_id="request-1", score=0)]


# --- memory and end


async def test_load_and_unload_return_the_residency(
    client: GatewayClient, adapters: FakeAdapters
) -> None:
    await adapters.add("pirate")
    loaded = await client.adapters.load("pirate", 1)
    assert [held.shard for held in loaded.residency] == ["shard-0"]
    assert not (await client.adapters.unload("pirate", 1)).residency


async def test_deleting_is_refused_while_there_is_traffic(
    client: GatewayClient, adapters: FakeAdapters
) -> None:
    await adapters.add("pirate")
    with pytest.raises(FailedPrecondition) as raised:
        await client.adapters.delete("pirate", 1)
    assert raised.value.reason == ErrorReason.ERROR_REASON_VERSION_IN_USE

    await client.adapters.set_traffic("pirate", {})
    deleted = await client.adapters.delete("pirate", 1)
    assert deleted.state == VersionState.VERSION_STATE_DELETED


# --- deadlines, errors


async def test_each_call_has_the_timeout_of_its_kind(adapters: FakeAdapters) -> None:
    await adapters.add("pirate")

    async def was(timeout_s: float) -> None:
        assert adapters.time_remaining_s == pytest.approx(timeout_s, abs=SLACK_S)

    async with (
        served(adapters) as target,
        GatewayClient(
            target,
            default_timeout_s=100,
            default_stream_timeout_s=200,
            default_job_timeout_s=400,
        ) as client,
    ):
        await client.adapters.get("pirate")
        await was(100)
        await client.adapters.create("pirate", "/pirate")
        await was(100)
        await client.adapters.create("pirate", "/pirate", wait=True)
        await was(200)
        await client.adapters.load("pirate", 1)
        await was(200)
        async with client.adapters.evaluate("pirate", [1]) as evaluation:
            await anext(evaluation)
        await was(400)
        await client.adapters.get("pirate", timeout_s=50)
        await was(50)


async def test_reading_is_tried_again(client: GatewayClient, adapters: FakeAdapters) -> None:
    await adapters.add("pirate")
    adapters.failures.extend([UNAVAILABLE, UNAVAILABLE])
    assert (await client.adapters.get("pirate")).adapter == "pirate"
    assert len(adapters.requests) == 3


@pytest.mark.parametrize(
    ("code", "reason", "kind"),
    [
        (grpc.StatusCode.PERMISSION_DENIED, "SOURCE_NOT_ALLOWED", PermissionDenied),
        (grpc.StatusCode.ABORTED, "ETAG_MISMATCH", Conflict),
        (grpc.StatusCode.NOT_FOUND, "VERSION_NOT_FOUND", NotFound),
        (grpc.StatusCode.ALREADY_EXISTS, "REQUEST_ID_REUSED", GatewayError),
        # No Overloaded: a full disk does not pass by waiting.
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "STORAGE_FULL", GatewayError),
    ],
)
async def test_reasons_of_adapters_have_their_classes(
    client: GatewayClient,
    adapters: FakeAdapters,
    code: grpc.StatusCode,
    reason: str,
    kind: type[GatewayError],
) -> None:
    adapters.failures.append(refusal(code, reason, "no", adapter="pirate"))
    with pytest.raises(GatewayError) as raised:
        await client.adapters.create("pirate", "/pirate")
    assert type(raised.value) is kind
    assert raised.value.reason == ErrorReason.Value(f"ERROR_REASON_{reason}")
    assert raised.value.metadata["adapter"] == "pirate"
