"""Sampling parameters as keywords."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from lora_gateway.v1.inference_pb2 import RepetitionDetection, SamplingParams, StructuredOutputs


class SamplingKeywords(TypedDict, total=False):
    """The fields of `SamplingParams` for type checkers; its comments tell what each means.

    None is the same as leaving a keyword out: the server's default applies.
    """

    n: int | None
    max_tokens: int | None
    min_tokens: int | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    seed: int | None
    presence_penalty: float | None
    frequency_penalty: float | None
    repetition_penalty: float | None
    stop: str | Sequence[str] | None
    stop_token_ids: Sequence[int] | None
    include_stop_str_in_output: bool | None
    ignore_eos: bool | None
    logprobs: int | None
    prompt_logprobs: int | None
    logprob_token_ids: Sequence[int] | None
    detokenize: bool | None
    skip_special_tokens: bool | None
    spaces_between_special_tokens: bool | None
    logit_bias: Mapping[int, float] | None
    allowed_token_ids: Sequence[int] | None
    bad_words: str | Sequence[str] | None
    structured_outputs: StructuredOutputs | None
    repetition_detection: RepetitionDetection | None


def sampling_params(
    sampling: SamplingParams | None, keywords: SamplingKeywords
) -> SamplingParams | None:
    """One message from either way of giving sampling parameters; None if neither was used.

    Raises:
        TypeError: both ways at once, a keyword that is no sampling parameter, or a
            value of another type than the parameter's.
        ValueError: a value out of its type's range, such as a negative `max_tokens`.
    """
    if unknown := keywords.keys() - SamplingParams.DESCRIPTOR.fields_by_name.keys():
        raise TypeError(f"no sampling parameter: {', '.join(sorted(unknown))}")
    fields: dict[str, Any] = {name: value for name, value in keywords.items() if value is not None}
    if not fields:
        return sampling
    if sampling is not None:
        raise TypeError(f"give sampling=, or {', '.join(fields)} as keywords, but not both")
    for name in ("stop", "bad_words"):
        # A lone string would pass for a list of its characters.
        if isinstance(fields.get(name), str):
            fields[name] = [fields[name]]
    return SamplingParams(**fields)
