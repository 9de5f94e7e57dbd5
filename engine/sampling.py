"""Sampling parameters: limits, checks that find every violation, and vLLM's own type.

Parameters travel as keyword arguments of `vllm.SamplingParams`, under its names. The edge
checks them here before anything is queued; vLLM checks what only it can.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from engine.errors import InvalidRequest, Violation

if TYPE_CHECKING:
    from vllm import SamplingParams

MAX_N = 64
"""Completions per request: vLLM allows 16384, a denial of service in one call."""
MAX_LOGPROBS = 20
"""Log probabilities per position; vLLM's default `max_logprobs`."""
MAX_TOKENS = 2**31 - 1


@dataclass(frozen=True, slots=True)
class _Range:
    """Allowed values of a number."""

    low: float
    high: float
    low_open: bool = False

    def allows(self, value: float) -> bool:
        above = value > self.low if self.low_open else value >= self.low
        return math.isfinite(value) and above and value <= self.high

    def __str__(self) -> str:
        if self.high == math.inf:
            return f"finite and above {self.low}"
        return f"in {'(' if self.low_open else '['}{self.low}, {self.high}]"


_RANGES: Mapping[str, _Range] = {
    "n": _Range(1, MAX_N),
    "max_tokens": _Range(1, MAX_TOKENS),
    "min_tokens": _Range(0, MAX_TOKENS),
    "temperature": _Range(0, 2),
    "top_p": _Range(0, 1, low_open=True),
    "top_k": _Range(0, MAX_TOKENS),
    "min_p": _Range(0, 1),
    "presence_penalty": _Range(-2, 2),
    "frequency_penalty": _Range(-2, 2),
    "repetition_penalty": _Range(0, math.inf, low_open=True),
    "logprobs": _Range(0, MAX_LOGPROBS),
    "prompt_logprobs": _Range(0, MAX_LOGPROBS),
}
MAX_ENTRIES: Mapping[str, int] = {
    "stop": 32,
    # Beyond these vLLM's GPU runner raises inside a step, which ends the engine for everyone
    # (vllm/v1/worker/gpu/sample/logit_bias.py:16; with the model's eos ids, stop ids count twice).
    "stop_token_ids": 64,
    "logit_bias": 1024,
    "allowed_token_ids": 1024,
    "logprob_token_ids": 128,
    "bad_words": 128,
}
"""Entries that a list or map may have."""
MAX_BAD_WORDS_BYTES = 480
"""Of all bad words together. vLLM's GPU runner holds 1024 tokens of them and ends the engine
at one more (bad_words.py:60); each word counts twice, with and without a leading space."""
MAX_SEED = 2**63 - 1
MAX_UNARY_LOGPROBS = 200_000
"""Log probabilities in one message: they are built on the event loop, at 10 us each."""
_STRING_BYTES: Mapping[str, int] = {"stop": 1024, "bad_words": 256}
_TOKEN_ID_FIELDS = ("stop_token_ids", "logprob_token_ids", "allowed_token_ids", "logit_bias")
LOGIT_BIAS_RANGE = _Range(-100, 100)


def violations(sampling: Mapping[str, Any], *, vocab_size: int, prefix: str) -> list[Violation]:
    """Every violation in the set parameters. `prefix` leads the field paths."""
    return [Violation(f"{prefix}.{name}", text) for name, text in _violations(sampling, vocab_size)]


def _violations(sampling: Mapping[str, Any], vocab_size: int) -> Iterator[tuple[str, str]]:
    for name, allowed in _RANGES.items():
        value = sampling.get(name)
        if value is not None and not allowed.allows(value):
            yield name, f"must be {allowed}, is {value:g}"
    too_long = [name for name, most in MAX_ENTRIES.items() if len(sampling.get(name, ())) > most]
    if too_long:  # their entries are not looked at: there may be millions
        for name in too_long:
            yield name, f"may have at most {MAX_ENTRIES[name]} entries"
        return
    for name, most in _STRING_BYTES.items():
        for index, text in enumerate(sampling.get(name, ())):
            if not 1 <= len(text.encode()) <= most:
                yield f"{name}[{index}]", f"must be 1 to {most} bytes"
    for name in _TOKEN_ID_FIELDS:
        outside = [i for i in sampling.get(name, ()) if not 0 <= i < vocab_size]
        if outside:
            yield name, f"token ids must be below {vocab_size}; {outside[0]} is not"
    for token_id, bias in sampling.get("logit_bias", {}).items():
        if not LOGIT_BIAS_RANGE.allows(bias):
            yield f"logit_bias[{token_id}]", f"must be {LOGIT_BIAS_RANGE}, is {bias:g}"
    yield from _contradictions(sampling)


def _contradictions(sampling: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if sampling.get("n", 1) > 1 and sampling.get("temperature") == 0:
        yield "n", "more than one completion needs temperature above 0; greedy ones are equal"
    if sampling.get("seed") == -1:
        yield "seed", "-1 means no seed to vLLM; leave it unset for that"
    if sampling.get("seed", 0) + sampling.get("n", 1) - 1 > MAX_SEED:
        yield "seed", "is too large: completion k uses seed + k"
    if sum(len(word.encode()) for word in sampling.get("bad_words", ())) > MAX_BAD_WORDS_BYTES:
        yield "bad_words", f"may have {MAX_BAD_WORDS_BYTES} bytes together"
    if "max_tokens" in sampling and sampling.get("min_tokens", 0) > sampling["max_tokens"]:
        yield "min_tokens", f"must not exceed max_tokens, which is {sampling['max_tokens']}"
    if sampling.get("stop") and sampling.get("detokenize") is False:
        yield "stop", "needs text; leave detokenize unset or use stop_token_ids"
    scored = sampling.get("logprob_token_ids")
    if scored and sampling.get("logprobs") not in (None, len(scored)):
        yield "logprobs", f"must be unset or {len(scored)}, the number of logprob_token_ids"
    repetition = sampling.get("repetition_detection")
    if repetition is not None:
        longest, shortest = repetition["max_pattern_size"], repetition["min_pattern_size"]
        if not 1 <= longest <= 256:
            yield "repetition_detection.max_pattern_size", f"must be in [1, 256], is {longest}"
        if shortest > longest:
            yield "repetition_detection.min_pattern_size", "must not exceed max_pattern_size"
        if not 2 <= repetition["min_count"] <= 256:
            yield (
                "repetition_detection.min_count",
                f"must be in [2, 256], is {repetition['min_count']}",
            )


def build_params(
    sampling: Mapping[str, Any],
    *,
    stream: bool,
    tokens_per_delta: int,
    prompt_tokens: int,
    room_tokens: int,
) -> SamplingParams:
    """vLLM's parameters for one request.

    `room_tokens` is what the context has left after the prompt; more cannot be generated,
    so a larger `max_tokens` ends there with LENGTH. Raises vLLM's VLLMValidationError, and
    InvalidRequest if one message would hold too many log probabilities.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import (
        RepetitionDetectionParams,
        RequestOutputKind,
        StructuredOutputsParams,
    )

    arguments = dict(sampling)
    arguments["max_tokens"] = min(arguments["max_tokens"], room_tokens)
    arguments["min_tokens"] = min(arguments.get("min_tokens", 0), arguments["max_tokens"])
    _check_logprobs(arguments, stream=stream, prompt_tokens=prompt_tokens)
    if "structured_outputs" in arguments:
        arguments["structured_outputs"] = StructuredOutputsParams(**arguments["structured_outputs"])
    if "repetition_detection" in arguments:
        arguments["repetition_detection"] = RepetitionDetectionParams(
            **arguments["repetition_detection"]
        )
    return SamplingParams(
        **arguments,
        output_kind=RequestOutputKind.DELTA if stream else RequestOutputKind.FINAL_ONLY,
        stream_interval=tokens_per_delta if stream and tokens_per_delta > 1 else None,
        skip_clone=True,  # built for this request alone
    )


def _check_logprobs(arguments: Mapping[str, Any], *, stream: bool, prompt_tokens: int) -> None:
    asked = {"sampling.prompt_logprobs": arguments.get("prompt_logprobs", -1) * prompt_tokens}
    if not stream:  # a stream spreads them over its messages
        per_token = arguments.get("logprobs", len(arguments.get("logprob_token_ids", ())) - 1) + 1
        asked["sampling.logprobs"] = per_token * arguments["max_tokens"] * arguments.get("n", 1)
    wrong = [
        Violation(field, f"asks for {count} in one message, more than {MAX_UNARY_LOGPROBS}")
        for field, count in asked.items()
        if count > MAX_UNARY_LOGPROBS
    ]
    if wrong:
        raise InvalidRequest(*wrong)
