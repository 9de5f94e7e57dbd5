"""From vLLM's outputs to ours, with nothing in them that the caller did not ask for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from engine.errors import GenerationFailed, ShardUnavailable
from engine.generation import (
    Delta,
    FinishReason,
    Output,
    PositionLogprobs,
    TokenLogprob,
)

if TYPE_CHECKING:
    from vllm.logprobs import Logprob
    from vllm.outputs import CompletionOutput, RequestOutput


def to_output(output: RequestOutput, sampling: Mapping[str, Any], shard: str) -> Output:
    """What a shard yields for one output of vLLM.

    `sampling` is what the request asked for. Raises ShardUnavailable for an abort that nobody
    here asked for, and GenerationFailed for an error.
    """
    metrics = output.metrics
    scored = sampling.get("logprob_token_ids") or sampling.get("logprobs", 0)
    asked_of_prompt = sampling.get("prompt_logprobs", 0)
    return Output(
        deltas=[_delta(completion, scored, sampling, shard) for completion in output.outputs],
        finished=output.finished,
        prompt_tokens=len(output.prompt_token_ids or ()),
        cached_tokens=output.num_cached_tokens or 0,
        queue_s=max(0.0, metrics.scheduled_ts - metrics.queued_ts) if metrics else 0.0,
        scheduled_s=metrics.scheduled_ts if metrics else 0.0,
        decode_s=metrics.last_token_ts - metrics.first_token_ts if metrics else 0.0,
        prompt_logprobs=[
            _position(entry, None, asked_of_prompt) for entry in output.prompt_logprobs or ()
        ],
    )


def _delta(
    completion: CompletionOutput,
    asked: int | Sequence[int],
    sampling: Mapping[str, Any],
    shard: str,
) -> Delta:
    token_ids, stop = completion.token_ids, completion.stop_reason
    logprobs = None
    if completion.logprobs is not None:
        logprobs = [
            _position(entry, token_id, asked)
            for entry, token_id in zip(completion.logprobs, token_ids, strict=True)
        ]
    return Delta(
        index=completion.index,
        text=completion.text,
        token_ids=token_ids,
        logprobs=logprobs,
        finish_reason=_finish_reason(completion.finish_reason, shard),
        stop=stop if _asked_for(stop, sampling) else None,
    )


def _finish_reason(reason: str | None, shard: str) -> FinishReason | None:
    """An abort that we did not ask for, or an error, is no way to finish."""
    if reason is None:
        return None
    if reason == "abort":
        raise ShardUnavailable(shard)
    if reason == "error":
        raise GenerationFailed("the engine reported an error for this request")
    return FinishReason(reason)


def _position(
    entry: Mapping[int, Logprob] | None, chosen_id: int | None, asked: int | Sequence[int]
) -> PositionLogprobs:
    """One position. vLLM gives the chosen token first, then those that were asked for:
    either that many of the likeliest, or certain ids."""
    if not entry:
        return PositionLogprobs(None, ())
    tokens = {
        token_id: TokenLogprob(token_id, lp.logprob, lp.rank or 0, lp.decoded_token or "")
        for token_id, lp in entry.items()
    }
    chosen = tokens[next(iter(tokens)) if chosen_id is None else chosen_id]
    if isinstance(asked, int):
        top = [token for token in tokens.values() if token.rank <= asked]
    else:
        # vLLM numbers these by their place in the request: no rank in the vocabulary is known.
        for token_id in asked:
            if token_id in tokens:
                tokens[token_id] = replace(tokens[token_id], rank=0)
        chosen = tokens[chosen.token_id]
        top = [tokens[token_id] for token_id in asked if token_id in tokens]
    return PositionLogprobs(chosen, sorted(top, key=lambda token: -token.logprob))


def _asked_for(stop: int | str | None, sampling: Mapping[str, Any]) -> bool:
    """Whether the caller named this stop: vLLM also tells the model's own end tokens, and that
    it detected a repetition."""
    return stop in sampling.get("stop" if isinstance(stop, str) else "stop_token_ids", ())
