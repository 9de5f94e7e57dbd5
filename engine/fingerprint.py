"""What a request is, in 64 bits: two requests with one fingerprint ask an engine for the same.

It travels in the id under which vLLM knows the request, so that a core knows it without another
message: `ours.fingerprint`, to which vLLM adds eight random characters, and in front the number
of each of several completions (vllm/v1/engine/input_processor.py:354, parallel_sampling.py:103).
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import xxhash

NOT_PART_OF_IT = frozenset({"seed"})
"""Callers who draw one for each try would have another fingerprint each time."""
_ID = re.compile(r"(?:\d+_)?(.+)\.([0-9a-f]{16})(?:-[0-9a-f]{8})?")


class Tagged(NamedTuple):
    """What an engine's id of a request says."""

    request_id: str
    """Ours."""
    fingerprint: int


def fingerprint(
    tenant: str, lora_name: str, token_ids: Sequence[int], sampling: Mapping[str, Any]
) -> int:
    """Of a tenant, a version (empty is the base model), a rendered prompt and what was set of
    `vllm.SamplingParams`.

    The tenant belongs to it, or one could have the prompts of another quarantined. Takes some
    microseconds.
    """
    digest = xxhash.xxh3_64(array("I", token_ids))
    digest.update(f"\n{tenant}\n{lora_name}\n{_canonical(sampling)}".encode())
    return digest.intdigest()


def _canonical(sampling: Mapping[str, Any]) -> str:
    """The same text for the same values, in whatever order a map came."""
    return repr(
        sorted(
            (name, sorted(value.items()) if isinstance(value, Mapping) else value)
            for name, value in sampling.items()
            if name not in NOT_PART_OF_IT
        )
    )


def tag(request_id: str, fingerprint: int) -> str:
    """The id to give to vLLM."""
    return f"{request_id}.{fingerprint:016x}"


def untag(engine_id: str) -> Tagged | None:
    """What such an id says, as vLLM's core knows it; None for one without a fingerprint."""
    found = _ID.fullmatch(engine_id)
    return None if found is None else Tagged(found[1], int(found[2], 16))
