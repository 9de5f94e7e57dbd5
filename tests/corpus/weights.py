"""Files that are called adapter_model.safetensors, and are none, or lie about themselves."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from typing import Any

import torch
from safetensors.torch import save

from engine.adapters import MAX_HEADER_BYTES, MAX_TENSORS
from tests.corpus.broken import Kind, spoiled
from tests.corpus.draft import Q_PROJ, Draft, Spoil, a, b, header, weights_are

LENGTH_BYTES = 8
"""How a safetensors file begins: the length of its header."""


def edited(edit: Callable[[bytes], bytes]) -> Spoil:
    """Change the bytes of the good file."""

    def spoil(draft: Draft) -> None:
        draft.weights_bytes = edit(draft.encoded_weights())

    return spoil


def cut_at(share: float) -> Spoil:
    """Keep so much of the data, and all of the header."""

    def edit(good: bytes) -> bytes:
        (header_bytes,) = struct.unpack_from("<Q", good)
        begin = LENGTH_BYTES + header_bytes
        return good[: begin + int((len(good) - begin) * share)]

    return edited(edit)


def described(edit: Callable[[dict[str, Any]], object]) -> Spoil:
    """Change what the header says of lora_A of the first query projection, not the data."""

    def spoil(draft: Draft) -> None:
        good = draft.encoded_weights()
        (header_bytes,) = struct.unpack_from("<Q", good)
        begin = LENGTH_BYTES + header_bytes
        description = json.loads(good[LENGTH_BYTES:begin])
        edit(description)
        draft.weights_bytes = header(json.dumps(description).encode(), good[begin:])

    return spoil


def says(**fields: Any) -> Spoil:
    return described(lambda description: description[a(Q_PROJ)].update(fields))


def shifted(by_bytes: int) -> Spoil:
    """Move one tensor's range, so that it overlaps another one, or leaves the file."""

    def edit(description: dict[str, Any]) -> None:
        entry = description[a(Q_PROJ)]
        entry["data_offsets"] = [offset + by_bytes for offset in entry["data_offsets"]]

    return described(edit)


def swapped_sizes(description: dict[str, Any]) -> None:
    """A tensor of another's size and place: the ranges fit, the shapes do not."""
    one, other = description[a(Q_PROJ)], description[b(Q_PROJ)]
    one["data_offsets"] = other["data_offsets"]


def key_twice(draft: Draft) -> None:
    """The last of two equal keys: an adapter with another lora_A than the first one says."""
    good = draft.encoded_weights()
    (header_bytes,) = struct.unpack_from("<Q", good)
    begin = LENGTH_BYTES + header_bytes
    description = json.loads(good[LENGTH_BYTES:begin])
    again = json.dumps({a(Q_PROJ): description[a(Q_PROJ)] | {"shape": [1, 1]}}).encode()
    text = json.dumps(description).encode()
    draft.weights_bytes = header(text[:-1] + b", " + again[1:], good[begin:])


def many_tensors(draft: Draft) -> None:
    draft.tensors.update({f"t{n}": torch.zeros(0) for n in range(20_000)})


DAMAGED = "is damaged or no safetensors file"
PICKLE = b"\x80\x04K\x01."

_GOOD = save({a(Q_PROJ): torch.ones(8, 256), b(Q_PROJ): torch.ones(256, 8)})

_CASES: Mapping[str, tuple[Spoil, str]] = {
    "weights-empty": (weights_are(b""), DAMAGED),
    "weights-one-byte": (weights_are(b"\x02"), DAMAGED),
    "cut-in-length": (edited(lambda good: good[:7]), DAMAGED),
    "cut-after-length": (edited(lambda good: good[:8]), DAMAGED),
    "cut-in-header": (edited(lambda good: good[:100]), DAMAGED),
    "cut-after-header": (cut_at(0.0), DAMAGED),
    "cut-in-data": (cut_at(0.5), DAMAGED),
    "cut-by-one-byte": (edited(lambda good: good[:-1]), DAMAGED),
    "trailing-byte": (edited(lambda good: good + b"\0"), DAMAGED),
    "trailing-file": (edited(lambda good: good + _GOOD), DAMAGED),
    "shifted-by-one-byte": (edited(lambda good: b"\0" + good), DAMAGED + "|begins with a header"),
    "pickle-bytes": (weights_are(PICKLE * 100), "begins with a header of"),
    "zip-bytes": (weights_are(b"PK\x03\x04" * 100), "begins with a header of"),
    "gguf-bytes": (weights_are(b"GGUF\x03\0\0\0" * 100), DAMAGED + "|begins with a header"),
    "git-lfs-pointer": (
        weights_are(b"version https://git-lfs.github.com/spec/v1\n"),
        "begins with a header of",
    ),
    "html-page": (weights_are(b"<!DOCTYPE html><title>404</title>"), "begins with a header of"),
    "zeros": (weights_are(bytes(4096)), DAMAGED),
    "length-astronomical": (
        weights_are(struct.pack("<Q", 2**63)),
        f"header of {2**63} bytes, and the limit is {MAX_HEADER_BYTES}",
    ),
    "length-all-ones": (weights_are(b"\xff" * 8), f"header of {2**64 - 1} bytes"),
    "length-beyond-file": (weights_are(struct.pack("<Q", 4096) + b"{}"), DAMAGED),
    "header-of-5-mb": (weights_are(header(b"{" + b" " * 5_000_000 + b"}")), "begins with a header"),
    "header-list": (weights_are(header(b"[]")), DAMAGED),
    "header-no-utf-8": (weights_are(header(b"\xff" * 8)), DAMAGED),
    "header-deep": (weights_are(header(b'{"a":' * 10_000)), DAMAGED),
    "header-empty": (weights_are(header(b"{}      ")), "has no LoRA weights"),
    "header-key-twice": (key_twice, DAMAGED),
    "offsets-overlap": (shifted(-4), DAMAGED),
    "offsets-leave-a-gap": (shifted(4), DAMAGED),
    "offsets-out-of-file": (shifted(2**40), DAMAGED),
    "offsets-reversed": (says(data_offsets=[8192, 0]), DAMAGED),
    "offsets-negative": (says(data_offsets=[-8192, 0]), DAMAGED),
    "offsets-of-another": (described(swapped_sizes), DAMAGED),
    "shape-negative": (says(shape=[-8, -256]), DAMAGED),
    "shape-overflows": (says(shape=[2**32, 2**32]), DAMAGED),
    "shape-other-than-data": (says(shape=[8, 512]), DAMAGED),
    "shape-text": (says(shape="8x256"), DAMAGED),
    "dtype-unknown": (says(dtype="F33"), DAMAGED),
    "dtype-other-than-data": (says(dtype="F64"), DAMAGED),
    "too-many-tensors": (many_tensors, f"has 20056 tensors, and the limit is {MAX_TENSORS}"),
}

WEIGHTS = spoiled(Kind.WEIGHTS, _CASES)
