"""Requests of Adapters become our types with every violation told at once, and records messages."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from hypothesis import given
from hypothesis import strategies as st

from engine.adapters import AdapterFacts
from engine.errors import InvalidRequest
from engine.generation import ServedVersion, VersionKey
from engine.intake import Announced
from engine.residency import Place
from gateway import adapter_codec as codec
from lora_gateway.v1 import adapters_pb2 as pb
from lora_gateway.v1.inference_pb2 import ModelFingerprints
from store.artifacts import MAX_WEIGHTS_BYTES
from store.records import (
    AdapterRecord,
    Arm,
    Content,
    EventKind,
    EventRecord,
    Guard,
    NewVersion,
    VersionRecord,
    VersionState,
)
from store.uploads import UploadPlan, UploadStatus

SHA256 = "a" * 64
MOMENT_NS = 1_700_000_000_123_456_789
CONTENT = Content("d" * 64, SHA256, 4096, 8, ("q_proj", "v_proj"))
NAMES = ["", "A", "-a", ".a", "a/b", "../a", "a b", "\xe9", "a" * 64, "a\n", "(base)"]


def violations(decode: Callable[[], object]) -> list[str]:
    """The fields that a request is refused for."""
    with pytest.raises(InvalidRequest) as caught:
        decode()
    assert all(violation.description for violation in caught.value.violations)
    return [violation.field for violation in caught.value.violations]


def create(**fields: Any) -> pb.CreateAdapterVersionRequest:
    """A good request, but for `fields`."""
    return pb.CreateAdapterVersionRequest(**{"adapter": "sql", "source_uri": "/x"} | fields)


def header(**fields: Any) -> pb.UploadHeader:
    """A good header, but for `fields`."""
    good: dict[str, Any] = {
        "upload_id": "Night-run.1",
        "adapter": "sql",
        "adapter_config": b"{}",
        "weights_size_bytes": 8,
        "weights_sha256": SHA256,
    }
    return pb.UploadHeader(**good | fields)


def traffic(*arms: tuple[int, int], guard: pb.TrafficGuard | None = None) -> pb.SetTrafficRequest:
    splits = [pb.TrafficSplit(version=version, weight=weight) for version, weight in arms]
    return pb.SetTrafficRequest(adapter="sql", splits=splits, guard=guard)


# --- names and versions ------------------------------------------------------


@pytest.mark.parametrize("name", ["a", "0", "a.b_c-d", "a" * 63])
def test_a_good_name_is_taken(name: str) -> None:
    assert codec.decode_adapter(name) == name
    assert codec.decode_key("default", name, 7) == VersionKey("default", name, 7)


@pytest.mark.parametrize("name", NAMES)
def test_a_bad_name_is_refused_wherever_it_stands(name: str) -> None:
    assert violations(lambda: codec.decode_adapter(name)) == ["adapter"]
    assert violations(lambda: codec.decode_key("default", name, 1)) == ["adapter"]
    assert violations(lambda: codec.decode_create(create(adapter=name), "default")) == ["adapter"]
    assert violations(lambda: codec.decode_upload(header(adapter=name))) == ["header.adapter"]
    bad = pb.SetTrafficRequest(adapter=name)
    assert violations(lambda: codec.decode_traffic(bad)) == ["adapter"]
    if name:
        assert violations(lambda: codec.decode_page_token(name)) == ["page_token"]


def test_a_version_is_required_beside_a_name() -> None:
    assert violations(lambda: codec.decode_key("default", "", 0)) == ["adapter", "version"]


# --- create and validate -----------------------------------------------------


def test_a_version_to_create_has_all_that_was_said() -> None:
    prints = ModelFingerprints(config_sha256=SHA256)
    request = create(
        expected_sha256=SHA256, labels={"team": "search"}, no_traffic=True, fingerprints=prints
    )
    assert codec.decode_create(request, "acme") == NewVersion(
        tenant="acme",
        adapter="sql",
        source_uri="/x",
        expected_sha256=SHA256,
        fingerprints={"config_sha256": SHA256},
        labels={"team": "search"},
        take_traffic=False,
    )
    assert codec.decode_create(create(), "acme").take_traffic


def test_everything_that_is_wrong_with_a_creation_is_told_at_once() -> None:
    request = create(
        adapter="Not A Name",
        source_uri="",
        expected_sha256="A" * 64,
        labels={"": "x", "k" * 64: "x", "v": "x" * 256},
        request_id="r" * 129,
    )
    assert sorted(violations(lambda: codec.decode_create(request, "default"))) == [
        *("adapter", "expected_sha256", "labels", "labels", "labels[v]", "request_id"),
        "source_uri",
    ]


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"source_uri": "upload:u"}, "source_uri"),
        ({"source_uri": "train:u/1/7"}, "source_uri"),
        ({"source_uri": "/" + "x" * 2048}, "source_uri"),
        ({"source_uri": "/" + "\xe9" * 1024}, "source_uri"),
        ({"expected_sha256": "a" * 63}, "expected_sha256"),
        ({"expected_sha256": "a" * 64 + "\n"}, "expected_sha256"),
        ({"labels": {str(number): "" for number in range(33)}}, "labels"),
        ({"request_id": "upload:u"}, "request_id"),
        ({"request_id": "adopt:sql:0"}, "request_id"),
        ({"request_id": "train:u:0:sql:1"}, "request_id"),
        ({"request_id": "\xe9" * 65}, "request_id"),
    ],
)
def test_limits_of_a_creation(fields: dict[str, Any], field: str) -> None:
    assert violations(lambda: codec.decode_create(create(**fields), "default")) == [field]


def test_what_is_at_its_limit_is_taken() -> None:
    labels = {f"{number:063}": "v" * 255 for number in range(32)}
    request = create(source_uri="/" + "x" * 2047, labels=labels, request_id="r" * 128)
    assert codec.decode_create(request, "default").labels == labels


def test_a_validation_compares_with_what_was_announced() -> None:
    prints = ModelFingerprints(tokenizer_sha256=SHA256)
    request = pb.ValidateAdapterRequest(
        source_uri="/x", expected_sha256=SHA256, fingerprints=prints
    )
    assert codec.decode_validate(request) == Announced(SHA256, {"tokenizer_sha256": SHA256})
    bad = pb.ValidateAdapterRequest(expected_sha256="x")
    assert violations(lambda: codec.decode_validate(bad)) == ["source_uri", "expected_sha256"]


# --- uploads -----------------------------------------------------------------


def test_an_upload_and_the_version_that_it_becomes() -> None:
    prints = ModelFingerprints(config_sha256=SHA256)
    request = header(labels={"team": "search"}, no_traffic=True, fingerprints=prints)
    plan = codec.decode_upload(request)
    assert plan == UploadPlan(
        upload_id="Night-run.1",
        adapter="sql",
        adapter_config=b"{}",
        weights_size_bytes=8,
        weights_sha256=SHA256,
        labels={"team": "search"},
        take_traffic=False,
        fingerprints={"config_sha256": SHA256},
    )
    assert codec.version_of_upload(plan, "acme") == NewVersion(
        tenant="acme",
        adapter="sql",
        source_uri="upload:Night-run.1",
        expected_sha256=SHA256,
        fingerprints={"config_sha256": SHA256},
        labels={"team": "search"},
        take_traffic=False,
    )


def test_everything_that_is_wrong_with_a_header_is_told_at_once() -> None:
    bad = pb.UploadHeader(upload_id="../x", labels={"": ""})
    assert violations(lambda: codec.decode_upload(bad)) == [
        *("header.adapter", "header.upload_id", "header.labels", "header.adapter_config"),
        *("header.weights_size_bytes", "header.weights_sha256"),
    ]


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"upload_id": ""}, "header.upload_id"),
        ({"upload_id": ".hidden"}, "header.upload_id"),
        ({"upload_id": "u" * 64}, "header.upload_id"),
        ({"upload_id": "u\n"}, "header.upload_id"),
        ({"adapter_config": b"x" * 65_537}, "header.adapter_config"),
        ({"weights_size_bytes": MAX_WEIGHTS_BYTES + 1}, "header.weights_size_bytes"),
        ({"weights_sha256": "A" * 64}, "header.weights_sha256"),
    ],
)
def test_limits_of_a_header(fields: dict[str, Any], field: str) -> None:
    assert violations(lambda: codec.decode_upload(header(**fields))) == [field]


def test_the_state_of_an_upload() -> None:
    told = codec.encode_upload(UploadStatus(512, 1024, False, 1_700_000_000.5))
    assert (told.offset, told.weights_size_bytes) == (512, 1024)
    assert told.expire_time == Timestamp(seconds=1_700_000_000, nanos=500_000_000)
    assert not codec.encode_upload(UploadStatus(8, 8, True, None)).HasField("expire_time")


# --- traffic -----------------------------------------------------------------


def test_a_split_with_its_guard() -> None:
    guard = pb.TrafficGuard(version=2, max_error_ratio=0.0, max_ttft_p95_ms=50)
    arms, decoded = codec.decode_traffic(traffic((1, 1_000_000), (2, 1), guard=guard))
    assert arms == [Arm(1, 1_000_000), Arm(2, 1)]
    assert decoded == Guard(2, 20, max_error_ratio=0.0, max_ttft_p95_ms=50.0)


def test_no_split_and_no_guard() -> None:
    assert codec.decode_traffic(traffic()) == ([], None)
    full = [(version, 1) for version in range(1, 17)]
    assert len(codec.decode_traffic(traffic(*full))[0]) == 16


def test_everything_that_is_wrong_with_a_split_is_told_at_once() -> None:
    guard = pb.TrafficGuard(
        version=9,
        min_requests=0,
        max_error_ratio=1.5,
        max_ttft_p95_ms=0,
        max_total_p95_ms=math.inf,
    )
    request = traffic((0, 0), (3, 1_000_001), (3, 1), guard=guard)
    request.adapter = "Not A Name"
    assert violations(lambda: codec.decode_traffic(request)) == [
        *("adapter", "splits", "splits[0].version", "splits[0].weight", "splits[1].weight"),
        *("guard.version", "guard.min_requests", "guard.max_error_ratio"),
        *("guard.max_ttft_p95_ms", "guard.max_total_p95_ms"),
    ]


@pytest.mark.parametrize(
    ("guard", "fields"),
    [
        ({"version": 1}, ["guard"]),
        ({}, ["guard.version", "guard"]),
        ({"version": 1, "min_requests": 10_001, "max_error_ratio": 0.5}, ["guard.min_requests"]),
        ({"version": 1, "max_error_ratio": -0.1}, ["guard.max_error_ratio"]),
        ({"version": 1, "max_error_ratio": math.nan}, ["guard.max_error_ratio"]),
        ({"version": 1, "max_ttft_p95_ms": math.nan}, ["guard.max_ttft_p95_ms"]),
        ({"version": 1, "max_total_p95_ms": -1.0}, ["guard.max_total_p95_ms"]),
    ],
)
def test_limits_of_a_guard(guard: dict[str, Any], fields: list[str]) -> None:
    request = traffic((1, 1), guard=pb.TrafficGuard(**guard))
    assert violations(lambda: codec.decode_traffic(request)) == fields


def test_far_too_many_arms_are_refused_without_telling_of_each() -> None:
    request = traffic(*[(0, 0)] * 100_000)
    fields = violations(lambda: codec.decode_traffic(request))
    assert fields[0] == "splits"
    assert len(fields) == 16


# --- pages -------------------------------------------------------------------


@pytest.mark.parametrize(("asked", "size"), [(0, 100), (1, 1), (1000, 1000)])
def test_the_size_of_a_page(asked: int, size: int) -> None:
    assert codec.decode_page_size(asked) == size


def test_a_page_that_is_too_large_is_refused() -> None:
    assert violations(lambda: codec.decode_page_size(1001)) == ["page_size"]


def test_tokens_of_versions_and_jobs_are_numbers() -> None:
    assert codec.decode_number_token("") is None
    assert codec.decode_number_token("12") == 12
    assert codec.decode_number_token("9" * 18) < 2**63, "a database takes it"  # type: ignore[operator]


@pytest.mark.parametrize("token", ["x", "-1", "1.0", "٣", "²", "1" * 19, " 1"])
def test_a_token_that_no_page_came_with_is_refused(token: str) -> None:
    assert violations(lambda: codec.decode_number_token(token)) == ["page_token"]


# --- answers -----------------------------------------------------------------


def version_record(**fields: Any) -> VersionRecord:
    """A READY version, but for `fields`."""
    ready = VersionRecord(
        *("default", "sql", 3, VersionState.READY, 9, "/x", "", {}, {"team": "search"}, True),
        *(MOMENT_NS, MOMENT_NS + 1, CONTENT),
    )
    return replace(ready, **fields)


def test_a_ready_version_tells_its_content_and_where_it_is() -> None:
    served = ServedVersion("default", "sql", 3, 9, "/secret/place", "d" * 64)
    told = codec.encode_version(version_record(), 5, {"shard-0": Place(served, 1.5, 0.25)})
    assert told.state == pb.VERSION_STATE_READY
    assert (told.adapter, told.version, told.weight) == ("sql", 3, 5)
    assert (told.digest, told.weights_sha256, told.size_bytes) == ("d" * 64, SHA256, 4096)
    assert (told.rank, list(told.target_modules)) == (8, ["q_proj", "v_proj"])
    assert told.create_time.ToNanoseconds() == MOMENT_NS
    assert told.update_time.ToNanoseconds() == MOMENT_NS + 1
    assert (told.source_uri, dict(told.labels)) == ("/x", {"team": "search"})
    (residency,) = told.residency
    assert (residency.shard, residency.load_duration_ms) == ("shard-0", 250)
    assert residency.load_time == Timestamp(seconds=1, nanos=500_000_000)
    assert b"/secret/place" not in told.SerializeToString()


def test_a_failed_version_tells_why_within_bounds() -> None:
    findings = tuple(f"finding {number}" for number in range(100))
    record = version_record(state=VersionState.FAILED, content=None, findings=findings)
    told = codec.encode_version(record)
    assert told.state == pb.VERSION_STATE_FAILED
    assert list(told.findings) == list(findings[:64])
    assert (told.digest, told.size_bytes, told.rank, list(told.residency)) == ("", 0, 0, [])


@pytest.mark.parametrize("state", VersionState)
def test_every_state_has_its_number(state: VersionState) -> None:
    told = codec.encode_version(version_record(state=state)).state
    assert pb.VersionState.Name(told) == f"VERSION_STATE_{state.name}"


@pytest.mark.parametrize("kind", EventKind)
def test_every_event_has_its_number(kind: EventKind) -> None:
    event = EventRecord(7, MOMENT_NS, kind, "default", "sql", 3, "ci", "why", (Arm(3, 1),))
    told = codec.encode_event(event)
    assert pb.EventKind.Name(told.kind) == f"EVENT_KIND_{kind.name}"
    assert (told.sequence, told.time.ToNanoseconds()) == (7, MOMENT_NS)
    assert (told.adapter, told.version, told.actor, told.reason) == ("sql", 3, "ci", "why")
    assert list(told.splits) == [pb.TrafficSplit(version=3, weight=1)]


optional_limits = st.none() | st.floats(min_value=0.001, max_value=1.0)


@given(st.integers(1, 10_000), optional_limits, optional_limits, st.floats(0.001, 1.0))
def test_a_guard_is_told_as_it_was_set(
    min_requests: int, ratio: float | None, ttft_ms: float | None, total_ms: float
) -> None:
    guard = Guard(1, min_requests, ratio, ttft_ms, total_ms)
    record = AdapterRecord(*("default", "sql", (Arm(1, 2),), guard, 4, 9, MOMENT_NS, MOMENT_NS + 5))
    told = codec.encode_adapter(record)
    assert (told.adapter, told.etag, told.latest_version) == ("sql", "t4", 9)
    assert told.create_time.ToNanoseconds() == MOMENT_NS
    assert told.traffic_time.ToNanoseconds() == MOMENT_NS + 5
    again = pb.SetTrafficRequest(adapter="sql", splits=told.splits, guard=told.guard)
    assert codec.decode_traffic(again) == ([Arm(1, 2)], guard)


def test_facts_of_a_valid_adapter() -> None:
    facts = AdapterFacts(8, ("q_proj",), 2, 4, 1024, "bfloat16")
    told = codec.encode_facts(facts, CONTENT)
    assert (told.rank, list(told.target_modules), told.module_count) == (8, ["q_proj"], 2)
    assert (told.parameter_count, told.dtype, told.size_bytes) == (1024, "bfloat16", 4096)
    assert (told.weights_sha256, told.digest) == (SHA256, "d" * 64)
