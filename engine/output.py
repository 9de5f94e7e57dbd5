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
    from vllm.logprobs import Logprob, PromptLogprobs
    from vllm.outputs import CompletionOutput, RequestOutput


class OutputReader:
    """Reads what vLLM says of one request."""

    __slots__ = ("_sampling", "_scored", "_shard")

    def __init__(self, sampling: Mapping[str, Any], shard: str) -> None:
        """`sampling` is what the request asked for."""
        self._sampling = sampling
        self._shard = shard
        self._scored = sampling.get("logprob_token_ids") or sampling.get("logprobs", 0)

    def read(self, output: RequestOutput) -> Output:
        """What a shard yields for one output. Runs once a token: what is rare stays out of line.

        Raises ShardUnavailable for an abort that nobody here asked for, and GenerationFailed for
        an error.
        """
        metrics = output.metrics
        return Output(
            [self._delta(completion) for completion in output.outputs],
            output.finished,
            len(output.prompt_token_ids or ()),
            output.num_cached_tokens or 0,
            max(0.0, metrics.scheduled_ts - metrics.queued_ts) if metrics else 0.0,
            metrics.scheduled_ts if metrics else 0.0,
            metrics.last_token_ts - metrics.first_token_ts if metrics else 0.0,
            self._prompt(output.prompt_logprobs) if output.prompt_logprobs else (),
        )

    def _delta(self, completion: CompletionOutput) -> Delta:
        delta = Delta(completion.index, completion.text, completion.token_ids)
        if completion.logprobs is not None:
            delta.logprobs = [
                _position(entry, token_id, self._scored)
                for entry, token_id in zip(completion.logprobs, completion.token_ids, strict=True)
            ]
        if completion.finish_reason is not None:
            delta.finish_reason = _finish_reason(completion.finish_reason, self._shard)
            if _asked_for(completion.stop_reason, self._sampling):
                delta.stop = completion.stop_reason
        return delta

    def _prompt(self, logprobs: PromptLogprobs) -> list[PositionLogprobs]:
        asked = self._sampling.get("prompt_logprobs", 0)
        return [_position(entry, None, asked) for entry in logprobs]


def _finish_reason(reason: str, shard: str) -> FinishReason:
    """An abort that we did not ask for, or an error, is no way to finish."""
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
