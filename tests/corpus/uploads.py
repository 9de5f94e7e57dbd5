"""Uploads that break their contract, or keep it and bring a broken adapter."""

from __future__ import annotations

import hashlib
import math
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lora_gateway.v1 import adapters_pb2 as ad
from store.artifacts import MAX_CONFIG_BYTES, MAX_WEIGHTS_BYTES
from tests.corpus.broken import Broken, Build, Kind, Upload
from tests.corpus.claims import OTHER_SHA256
from tests.corpus.draft import Q_PROJ, Draft, a, good_draft
from tests.corpus.files import Canary

CHUNK_BYTES = 100_000

Requests = Sequence[ad.UploadAdapterVersionRequest]


def header(folder: Path, draft: Draft, **fields: Any) -> ad.UploadAdapterVersionRequest:
    """The first request of an upload that goes well, but for `fields`."""
    weights = draft.encoded_weights()
    right: dict[str, Any] = {
        "upload_id": folder.name,
        "adapter": folder.name,
        "adapter_config": draft.encoded_config(),
        "weights_size_bytes": len(weights),
        "weights_sha256": hashlib.sha256(weights).hexdigest(),
        "wait": True,
    }
    return ad.UploadAdapterVersionRequest(header=ad.UploadHeader(**(right | fields)))


def chunk(offset: int, data: bytes) -> ad.UploadAdapterVersionRequest:
    return ad.UploadAdapterVersionRequest(chunk=ad.UploadChunk(offset=offset, data=data))


def chunks(weights: bytes) -> Requests:
    """All of them, as they should come."""
    return [
        chunk(offset, weights[offset : offset + CHUNK_BYTES])
        for offset in range(0, len(weights), CHUNK_BYTES)
    ]


def announced(**fields: Any) -> Build:
    """A good adapter under a header that says something else."""

    def build(folder: Path, model: Path) -> Upload:
        draft = good_draft(model)
        return Upload([header(folder, draft, **fields), *chunks(draft.encoded_weights())])

    return build


def streamed(edit: Callable[[Requests], Requests]) -> Build:
    """A good adapter whose chunks come in another way."""

    def build(folder: Path, model: Path) -> Upload:
        draft = good_draft(model)
        return Upload([header(folder, draft), *edit(chunks(draft.encoded_weights()))])

    return build


def brought(spoil: Callable[[Draft, Path], object]) -> Build:
    """A flawless upload of a broken adapter."""

    def build(folder: Path, model: Path) -> Upload:
        draft = good_draft(model)
        spoil(draft, folder)
        return Upload([header(folder, draft), *chunks(draft.encoded_weights())])

    return build


def without_header(folder: Path, model: Path) -> Upload:
    return Upload(chunks(good_draft(model).encoded_weights()))


def too_many(folder: Path, model: Path) -> Upload:
    draft = good_draft(model)
    weights = draft.encoded_weights()
    first = header(folder, draft, weights_sha256=OTHER_SHA256)  # nor is it good without the rest
    return Upload([first, *chunks(weights), chunk(len(weights), b"more")])


def damaged(them: Requests) -> Requests:
    """One bit, on the way."""
    last = them[-1].chunk
    return [*them[:-1], chunk(last.offset, bytes([last.data[0] ^ 1]) + last.data[1:])]


def diverged(draft: Draft, folder: Path) -> None:
    draft.tensors[a(Q_PROJ)][0, 0] = math.nan


def pickled(draft: Draft, folder: Path) -> None:
    draft.weights_bytes = pickle.dumps(Canary(folder))


def prose(draft: Draft, folder: Path) -> None:
    draft.config_bytes = b"not json"


FIELD, OFFSET, CHECKSUM = "INVALID_FIELD", "UPLOAD_OFFSET_MISMATCH", "CHECKSUM_MISMATCH"

UPLOADS = tuple(
    Broken(name, Kind.UPLOAD, build, expected, reason)
    for name, build, reason, expected in (
        (
            "upload-other-sha256",
            announced(weights_sha256=OTHER_SHA256),
            "CHECKSUM_MISMATCH",
            "sha256",
        ),
        ("upload-damaged", streamed(damaged), CHECKSUM, "sha256"),
        ("upload-cut", streamed(lambda them: them[:-1]), "UPLOAD_INCOMPLETE", r"offset [1-9]\d+"),
        ("upload-without-chunks", streamed(lambda _: []), "UPLOAD_INCOMPLETE", "offset 0"),
        ("upload-with-gap", streamed(lambda them: [them[0], *them[2:]]), OFFSET, "go on from"),
        ("upload-with-chunk-twice", streamed(lambda them: [them[0], *them]), OFFSET, "go on from"),
        ("upload-out-of-order", streamed(lambda them: them[::-1]), OFFSET, "go on from"),
        ("upload-too-long", too_many, FIELD, "more are sent"),
        ("upload-without-header", without_header, FIELD, "header"),
        ("upload-empty-chunk", streamed(lambda them: [them[0], chunk(0, b"")]), FIELD, "chunk"),
        (
            "upload-large-config",
            announced(adapter_config=b" " * (MAX_CONFIG_BYTES + 1)),
            FIELD,
            "adapter_config",
        ),
        ("upload-without-config", announced(adapter_config=b""), FIELD, "adapter_config"),
        (
            "upload-over-the-limit",
            announced(weights_size_bytes=MAX_WEIGHTS_BYTES + 1),
            FIELD,
            "weights_size_bytes",
        ),
        ("upload-without-size", announced(weights_size_bytes=0), FIELD, "weights_size_bytes"),
        ("upload-without-sha256", announced(weights_sha256=""), FIELD, "weights_sha256"),
        ("upload-without-id", announced(upload_id=""), FIELD, "upload_id"),
        ("upload-id-is-path", announced(upload_id="../../adapters/x"), FIELD, "upload_id"),
        ("upload-adapter-is-path", announced(adapter="../x"), FIELD, "adapter"),
        ("upload-diverged", brought(diverged), "ADAPTER_INVALID", "hold NaN or infinity"),
        ("upload-pickle", brought(pickled), "ADAPTER_INVALID", "header|damaged"),
        ("upload-prose", brought(prose), "ADAPTER_INVALID", "is not JSON"),
    )
)
