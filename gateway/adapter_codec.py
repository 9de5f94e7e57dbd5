"""Protobuf of the Adapters service to our own types and back. Pure.

A `decode` function raises InvalidRequest with every violation at once.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict

from google.protobuf.timestamp_pb2 import Timestamp

from engine.adapters import AdapterFacts
from engine.catalog import ADOPT_SCHEME
from engine.errors import InvalidRequest, Violation
from engine.generation import VersionKey
from engine.intake import UPLOAD_SCHEME, Announced
from engine.residency import Place
from gateway.checkpoint_sources import TRAIN_SCHEME
from lora_gateway.v1 import adapters_pb2 as pb
from lora_gateway.v1.inference_pb2 import ModelFingerprints
from store.artifacts import MAX_CONFIG_BYTES, MAX_WEIGHTS_BYTES
from store.records import (
    DIGEST,
    NAME,
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

UPLOAD_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
MAX_REQUEST_ID_BYTES = 128
OUR_REQUEST_IDS = (UPLOAD_SCHEME, ADOPT_SCHEME, TRAIN_SCHEME)
"""How request ids begin that the gateway makes: who could name one would find its version."""
MAX_SOURCE_BYTES = 2048
MAX_LABELS, MAX_LABEL_KEY_BYTES, MAX_LABEL_VALUE_BYTES = 32, 63, 255
MAX_ARMS, MAX_WEIGHT = 16, 1_000_000
MAX_FINDINGS = 64
DEFAULT_PAGE, MAX_PAGE = 100, 1000
MAX_CHUNK_BYTES = 4 * 1024**2
DEFAULT_MIN_REQUESTS, MAX_MIN_REQUESTS = 20, 10_000

_STATES = {state: pb.VersionState.Value(f"VERSION_STATE_{state.name}") for state in VersionState}
_KINDS = {kind: pb.EventKind.Value(f"EVENT_KIND_{kind.name}") for kind in EventKind}


def refuse(violations: Iterable[Violation]) -> None:
    """Raise InvalidRequest if there are any."""
    found = list(violations)
    if found:
        raise InvalidRequest(*found)


def name_violations(adapter: str, field: str = "adapter") -> Iterable[Violation]:
    """What is wrong with an adapter's name."""
    if not NAME.fullmatch(adapter):
        yield Violation(field, f"is required and must match {NAME.pattern}")


def decode_adapter(adapter: str) -> str:
    """A name on its own."""
    refuse(name_violations(adapter))
    return adapter


def decode_key(tenant: str, adapter: str, version: int) -> VersionKey:
    """A version by name and number."""
    wrong = list(name_violations(adapter))
    if not version:
        wrong.append(Violation("version", "is required; versions count from 1"))
    refuse(wrong)
    return VersionKey(tenant, adapter, version)


def decode_create(request: pb.CreateAdapterVersionRequest, tenant: str) -> NewVersion:
    """What to create."""
    wrong = [
        *name_violations(request.adapter),
        *_source_violations(request.source_uri, request.expected_sha256),
        *label_violations(request.labels, "labels"),
        *_fingerprint_violations(request.fingerprints, "fingerprints"),
    ]
    if len(request.request_id.encode()) > MAX_REQUEST_ID_BYTES:
        wrong.append(Violation("request_id", f"may have {MAX_REQUEST_ID_BYTES} bytes"))
    for scheme in OUR_REQUEST_IDS:
        if request.request_id.startswith(scheme):
            wrong.append(Violation("request_id", f"must not begin with {scheme}"))
    refuse(wrong)
    return NewVersion(
        tenant=tenant,
        adapter=request.adapter,
        source_uri=request.source_uri,
        expected_sha256=request.expected_sha256,
        fingerprints=_fingerprints(request.fingerprints),
        labels=dict(request.labels),
        take_traffic=not request.no_traffic,
    )


def decode_validate(request: pb.ValidateAdapterRequest) -> Announced:
    """What the adapter is to be compared with."""
    refuse(
        [
            *_source_violations(request.source_uri, request.expected_sha256),
            *_fingerprint_violations(request.fingerprints, "fingerprints"),
        ]
    )
    return Announced(request.expected_sha256, _fingerprints(request.fingerprints))


def decode_upload(header: pb.UploadHeader) -> UploadPlan:
    """What is going to be uploaded."""
    wrong = [
        *name_violations(header.adapter, "header.adapter"),
        *upload_id_violations(header.upload_id, "header.upload_id"),
        *label_violations(header.labels, "header.labels"),
        *_fingerprint_violations(header.fingerprints, "header.fingerprints"),
    ]
    if not 1 <= len(header.adapter_config) <= MAX_CONFIG_BYTES:
        wrong.append(Violation("header.adapter_config", f"must be 1 to {MAX_CONFIG_BYTES} bytes"))
    if not 1 <= header.weights_size_bytes <= MAX_WEIGHTS_BYTES:
        wrong.append(Violation("header.weights_size_bytes", f"must be 1 to {MAX_WEIGHTS_BYTES}"))
    if not DIGEST.fullmatch(header.weights_sha256):
        wrong.append(Violation("header.weights_sha256", "is required, as 64 lower-case hex digits"))
    refuse(wrong)
    return UploadPlan(
        upload_id=header.upload_id,
        adapter=header.adapter,
        adapter_config=header.adapter_config,
        weights_size_bytes=header.weights_size_bytes,
        weights_sha256=header.weights_sha256,
        labels=dict(header.labels),
        take_traffic=not header.no_traffic,
        fingerprints=_fingerprints(header.fingerprints),
    )


def upload_id_violations(upload_id: str, field: str = "upload_id") -> Iterable[Violation]:
    """What is wrong with the id of an upload."""
    if not UPLOAD_ID.fullmatch(upload_id):
        yield Violation(field, f"is required and must match {UPLOAD_ID.pattern}")


def version_of_upload(plan: UploadPlan, tenant: str) -> NewVersion:
    """The version that a complete upload becomes."""
    return NewVersion(
        tenant=tenant,
        adapter=plan.adapter,
        source_uri=UPLOAD_SCHEME + plan.upload_id,
        expected_sha256=plan.weights_sha256,
        fingerprints=plan.fingerprints,
        labels=plan.labels,
        take_traffic=plan.take_traffic,
    )


def decode_traffic(request: pb.SetTrafficRequest) -> tuple[list[Arm], Guard | None]:
    """The arms, and the guard of one of them."""
    wrong = list(name_violations(request.adapter))
    versions = [split.version for split in request.splits]
    if len(versions) > MAX_ARMS:
        wrong.append(Violation("splits", f"may have {MAX_ARMS} entries"))
    elif len(set(versions)) != len(versions):
        wrong.append(Violation("splits", "must name each version once"))
    for index, split in enumerate(request.splits[: MAX_ARMS + 1]):
        if not split.version:
            wrong.append(Violation(f"splits[{index}].version", "is required"))
        if not 1 <= split.weight <= MAX_WEIGHT:
            wrong.append(
                Violation(
                    f"splits[{index}].weight",
                    f"must be 1 to {MAX_WEIGHT}; leave out a version that gets no traffic",
                )
            )
    guard = None
    if request.HasField("guard"):
        wrong += _guard_violations(request.guard, versions)
        guard = _guard(request.guard)
    refuse(wrong)
    return [Arm(split.version, split.weight) for split in request.splits], guard


def _guard_violations(guard: pb.TrafficGuard, versions: list[int]) -> Iterable[Violation]:
    if guard.version not in versions:
        yield Violation("guard.version", "must be one of the splits")
    if guard.HasField("min_requests") and not 1 <= guard.min_requests <= MAX_MIN_REQUESTS:
        yield Violation("guard.min_requests", f"must be 1 to {MAX_MIN_REQUESTS}")
    if not any(field.name.startswith("max_") for field, _ in guard.ListFields()):
        yield Violation(
            "guard", "needs a limit: max_error_ratio, max_ttft_p95_ms or max_total_p95_ms"
        )
    if guard.HasField("max_error_ratio") and not 0 <= guard.max_error_ratio <= 1:
        yield Violation("guard.max_error_ratio", "must be in [0, 1]")
    for field, value in guard.ListFields():
        if field.name.endswith("_p95_ms") and not 0 < value < math.inf:
            yield Violation(f"guard.{field.name}", "must be above 0")


def _guard(message: pb.TrafficGuard) -> Guard:
    fields = {field.name: value for field, value in message.ListFields()}
    return Guard(**{"version": 0, "min_requests": DEFAULT_MIN_REQUESTS, **fields})


def decode_page_size(page_size: int) -> int:
    """How many to list."""
    if page_size > MAX_PAGE:
        raise InvalidRequest(Violation("page_size", f"may be {MAX_PAGE}"))
    return page_size or DEFAULT_PAGE


def decode_page_token(page_token: str) -> str:
    """The name after which a page of adapters or datasets begins. Nothing need have it any more."""
    if page_token:
        refuse(name_violations(page_token, "page_token"))
    return page_token


def decode_number_token(page_token: str) -> int | None:
    """The number below which a page of versions or jobs begins; None for the newest."""
    if not page_token:
        return None
    if not (page_token.isascii() and page_token.isdecimal() and len(page_token) < 19):
        raise InvalidRequest(Violation("page_token", "must be one that a page came with"))
    return int(page_token)


def _source_violations(source_uri: str, expected_sha256: str) -> Iterable[Violation]:
    if not source_uri:
        yield Violation("source_uri", "is required: the folder of the adapter, or its URL")
    elif len(source_uri.encode()) > MAX_SOURCE_BYTES:
        yield Violation("source_uri", f"may have {MAX_SOURCE_BYTES} bytes")
    elif source_uri.startswith(UPLOAD_SCHEME):
        yield Violation("source_uri", "names an upload; UploadAdapterVersion makes it a version")
    elif source_uri.startswith(TRAIN_SCHEME):
        yield Violation("source_uri", "names a checkpoint; PublishCheckpoint makes it a version")
    if expected_sha256 and not DIGEST.fullmatch(expected_sha256):
        yield Violation("expected_sha256", "must be 64 lower-case hex digits, or empty")


def label_violations(labels: Mapping[str, str], field: str) -> Iterable[Violation]:
    """What is wrong with labels."""
    if len(labels) > MAX_LABELS:
        yield Violation(field, f"may have {MAX_LABELS} entries")
        return
    for key, value in labels.items():
        if not 1 <= len(key.encode()) <= MAX_LABEL_KEY_BYTES:
            yield Violation(field, f"keys must be 1 to {MAX_LABEL_KEY_BYTES} bytes")
        if len(value.encode()) > MAX_LABEL_VALUE_BYTES:
            yield Violation(f"{field}[{key}]", f"may have {MAX_LABEL_VALUE_BYTES} bytes")


def _fingerprint_violations(message: ModelFingerprints, field: str) -> Iterable[Violation]:
    for name, value in _fingerprints(message).items():
        if not DIGEST.fullmatch(value):
            yield Violation(f"{field}.{name}", "must be 64 lower-case hex digits, or empty")


def _fingerprints(message: ModelFingerprints) -> dict[str, str]:
    return {field.name: value for field, value in message.ListFields()}


def encode_version(
    record: VersionRecord, weight: int = 0, places: Mapping[str, Place] | None = None
) -> pb.AdapterVersion:
    """A version as callers see it; `places` are its shards."""
    content = record.content
    return pb.AdapterVersion(
        adapter=record.adapter,
        version=record.version,
        state=_STATES[record.state],
        digest=content.digest if content else "",
        size_bytes=content.size_bytes if content else 0,
        rank=content.rank if content else 0,
        create_time=encode_time(record.create_time_ns),
        residency=[
            pb.Residency(
                shard=shard,
                load_time=encode_time(int(place.load_time_s * 1e9)),
                load_duration_ms=place.load_duration_s * 1000,
            )
            for shard, place in (places or {}).items()
        ],
        update_time=encode_time(record.update_time_ns),
        source_uri=record.source_uri,
        labels=record.labels,
        target_modules=content.target_modules if content else (),
        findings=record.findings[:MAX_FINDINGS],
        weights_sha256=content.weights_sha256 if content else "",
        weight=weight,
    )


def encode_adapter(record: AdapterRecord) -> pb.Adapter:
    """An adapter as callers see it."""
    guard = record.guard
    return pb.Adapter(
        adapter=record.adapter,
        splits=_splits(record.arms),
        etag=record.etag,
        latest_version=record.latest_version,
        create_time=encode_time(record.create_time_ns),
        traffic_time=encode_time(record.traffic_time_ns),
        guard=None if guard is None else pb.TrafficGuard(**asdict(guard)),
    )


def encode_facts(facts: AdapterFacts, content: Content) -> pb.AdapterFacts:
    """What a check learned."""
    return pb.AdapterFacts(
        rank=facts.rank,
        target_modules=facts.target_modules,
        module_count=facts.num_modules,
        parameter_count=facts.num_parameters,
        dtype=facts.dtype,
        size_bytes=content.size_bytes,
        weights_sha256=content.weights_sha256,
        digest=content.digest,
    )


def encode_event(event: EventRecord) -> pb.AdapterEvent:
    """One change."""
    return pb.AdapterEvent(
        sequence=event.sequence,
        time=encode_time(event.time_ns),
        kind=_KINDS[event.kind],
        adapter=event.adapter,
        version=event.version,
        actor=event.actor,
        reason=event.reason,
        splits=_splits(event.arms),
    )


def encode_upload(status: UploadStatus) -> pb.QueryUploadResponse:
    """Where an upload stands."""
    expires_s = status.expire_time_s
    return pb.QueryUploadResponse(
        offset=status.offset,
        weights_size_bytes=status.size_bytes,
        expire_time=None if expires_s is None else encode_time(int(expires_s * 1e9)),
    )


def _splits(arms: Iterable[Arm]) -> list[pb.TrafficSplit]:
    return [pb.TrafficSplit(version=arm.version, weight=arm.weight) for arm in arms]


def encode_time(time_ns: int) -> Timestamp:
    """A moment, from nanoseconds since the epoch."""
    stamp = Timestamp()
    stamp.FromNanoseconds(time_ns)
    return stamp
