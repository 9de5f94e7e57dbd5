"""Outcomes of requests, as tests want them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from gateway.arms import Outcome

_GOOD = Outcome(
    tenant="default",
    adapter="pirate",
    version=1,
    request_id="r",
    code="OK",
    end_s=1_000.0,
    ttft_s=0.05,
    total_s=0.4,
    prompt_tokens=10,
    completion_tokens=8,
    inter_token_s=0.05,
    finish_reasons=("stop",),
)


def outcome(**fields: Any) -> Outcome:
    """A request that ended well, but for `fields`."""
    return replace(_GOOD, **fields)


def failure(**fields: Any) -> Outcome:
    """A request that the server failed before its first token, but for `fields`."""
    nothing: dict[str, Any] = {
        "code": "INTERNAL",
        "ttft_s": None,
        "completion_tokens": 0,
        "inter_token_s": None,
        "finish_reasons": (),
    }
    return outcome(**(nothing | fields))
