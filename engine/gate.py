"""The gate: whether an engine says of an adapter what its trainer said.

vLLM can load an adapter and apply it wrongly, or not at all, without a word
(vllm/lora/model_manager.py:394). So the trainer writes down the log probabilities of some rows,
with the adapter and without it, and the engine scores the same tokens, with the version and with
the base model. What differs, and by how much, is measured here; limits say how much may.

Nats between trainer and engine do not show an adapter that the engine ignores where the trainer's
base model is in 4 bits: that alone is 0.7 nats a token (SmolLM2-135M), and many an adapter is worth
less. How much of the adapter's effect arrives does: 0.83 to 0.90 of it for those that had learned
0.07 to 3.1 nats, and less than 0.05 for one that is ignored; docs/training.md has the table.
"""

from __future__ import annotations

import asyncio
import enum
import itertools
import math
import uuid
from collections.abc import Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from engine.errors import GenerationFailed, ShardUnavailable
from engine.generation import GenerationRequest, Output, ServedVersion
from engine.shard import Shard

ROWS_AT_ONCE = 4
"""Scores of a prompt take memory of the engine, and live traffic has to go on."""
ROW_TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True)
class Row:
    """Tokens, and what the trainer says of some of them."""

    token_ids: Sequence[int]
    positions: Sequence[int]
    """Indices into `token_ids` of the tokens that count, from 1 up."""
    logprobs: Sequence[float]
    """Of each of these after the tokens before it, in nats, by the trainer's model."""
    base_logprobs: Sequence[float] | None = None
    """The same without the adapter; None: the trainer did not say."""


@dataclass(frozen=True, slots=True)
class Limits:
    """How much may differ; None: as much as it likes."""

    logprob_delta_mean: float | None = None
    """Nats a token between trainer and engine, on average."""
    logprob_delta: float | None = None
    """The same of the worst token."""
    eval_loss_ratio: float | None = None
    """Of the version's loss to the base model's."""
    eval_loss: float | None = None
    """Of the version, in nats a token."""
    effect_ratio: float | None = None
    """At least this, of the effect in the engine to that in the trainer."""


@dataclass(frozen=True, slots=True)
class Measured:
    """What the rows show, over all their tokens; all but the counts in nats a token."""

    rows: int
    tokens: int
    logprob_delta_mean: float
    """Mean absolute difference between trainer and engine."""
    logprob_delta_max: float
    eval_loss: float
    base_eval_loss: float
    effect_mean: float
    """Mean absolute difference between version and base model, both in the engine."""
    trained_effect_mean: float | None = None
    """The same in the trainer, with the adapter and without; None: it did not say."""

    @property
    def effect_ratio(self) -> float | None:
        """How much of the adapter's effect arrives; None: that is not known, or it has none."""
        return self.effect_mean / self.trained_effect_mean if self.trained_effect_mean else None

    @property
    def is_finite(self) -> bool:
        """Whether these are numbers that one can go by."""
        return all(
            math.isfinite(value)
            for value in (
                self.logprob_delta_mean,
                self.logprob_delta_max,
                self.eval_loss,
                self.base_eval_loss,
                self.effect_mean,
                self.trained_effect_mean or 0.0,
            )
        )


class Reason(enum.Enum):
    """What an adapter is refused for; the values are a metric's label."""

    LOGPROB_DELTA = "logprob_delta"
    EVAL_LOSS = "eval_loss"
    EFFECT = "effect"
    SHAPE = "shape"
    OTHER = "other"


@dataclass(frozen=True, slots=True)
class Fault:
    """Why the gate says no."""

    reason: Reason
    text: str
    """What was measured, what is allowed, and what to do."""


def faults(measured: Measured, limits: Limits) -> list[Fault]:
    """Why what was measured is not good enough; empty if it is."""
    return list(_faults(measured, limits))


def _faults(measured: Measured, limits: Limits) -> Iterator[Fault]:
    if not measured.tokens:
        yield Fault(
            Reason.OTHER,
            "there are no rows to compare trainer and engine by: train on rows that are shorter "
            "than the engine's context, and trained on beyond their first token",
        )
        return
    if not (math.isfinite(measured.eval_loss) and math.isfinite(measured.effect_mean)):
        yield Fault(
            Reason.OTHER,
            "the engine answers in NaN or infinity: train again with a lower lora.alpha or "
            "learning_rate",
        )
        return
    if not measured.is_finite:
        yield Fault(
            Reason.OTHER,
            "the trainer's log probabilities are NaN or infinity: train again with a lower "
            "learning_rate",
        )
        return
    if not measured.effect_mean:
        yield Fault(
            Reason.EFFECT,
            "it changes nothing: the engine gives every token the base model's probability, to "
            "the last bit; train longer or with a higher learning_rate",
        )
    elif _falls_short(measured.effect_ratio, limits.effect_ratio):
        yield Fault(
            Reason.EFFECT,
            f"it changes log probabilities by {measured.trained_effect_mean:.3g} nats a token in "
            f"the trainer and by {measured.effect_mean:.3g} in the engine, which is "
            f"{measured.effect_ratio:.2g} of it, and min_effect_ratio is {limits.effect_ratio:g}: "
            "the engine does not apply all of it; train with other lora.target_modules or without "
            "lora.use_rslora, and tell the operator, or allow less with "
            "publish.gate.min_effect_ratio",
        )
    yield from _delta_faults(measured, limits)
    yield from _loss_faults(measured, limits)


def _delta_faults(measured: Measured, limits: Limits) -> Iterator[Fault]:
    advice = (
        "train as it is served (quantization NONE, the served precision), serve as it was "
        "trained, or allow more with publish.gate"
    )
    if _exceeds(measured.logprob_delta_mean, limits.logprob_delta_mean):
        yield Fault(
            Reason.LOGPROB_DELTA,
            "log probabilities of trainer and engine differ by "
            f"{measured.logprob_delta_mean:.3g} nats a token, and max_logprob_delta_mean is "
            f"{limits.logprob_delta_mean:g}: {advice}.max_logprob_delta_mean",
        )
    if _exceeds(measured.logprob_delta_max, limits.logprob_delta):
        yield Fault(
            Reason.LOGPROB_DELTA,
            "log probabilities of trainer and engine differ by "
            f"{measured.logprob_delta_max:.3g} nats at the worst token, and max_logprob_delta is "
            f"{limits.logprob_delta:g}: {advice}.max_logprob_delta",
        )


def _loss_faults(measured: Measured, limits: Limits) -> Iterator[Fault]:
    # By a product: the base model's loss may be 0.
    ratio = limits.eval_loss_ratio
    if ratio is not None and measured.eval_loss > ratio * measured.base_eval_loss:
        yield Fault(
            Reason.EVAL_LOSS,
            f"its eval loss is {measured.eval_loss:.4g} nats a token and the base model's "
            f"{measured.base_eval_loss:.4g}, and max_eval_loss_ratio is {ratio:g}: it "
            "learned nothing of use for these rows; train longer, with a lower learning_rate or "
            "on more rows, or allow more with publish.gate.max_eval_loss_ratio",
        )
    if _exceeds(measured.eval_loss, limits.eval_loss):
        yield Fault(
            Reason.EVAL_LOSS,
            f"its eval loss is {measured.eval_loss:.4g} nats a token, and max_eval_loss is "
            f"{limits.eval_loss:g}: train longer or on more rows, or allow more with "
            "publish.gate.max_eval_loss",
        )


def _exceeds(value: float, limit: float | None) -> bool:
    return limit is not None and value > limit


def _falls_short(value: float | None, limit: float | None) -> bool:
    return value is not None and limit is not None and value < limit


class Gate:
    """Scores rows on one shard."""

    def __init__(self, shard: Shard, max_model_len: int) -> None:
        """`max_model_len` is the longest context of the shard, in tokens."""
        self._shard = shard
        self._max_row_tokens = max_model_len - 1  # the engine has to generate one
        self._places = asyncio.Semaphore(ROWS_AT_ONCE)
        self._id = uuid.uuid4().hex
        self._numbers = itertools.count()

    async def measure(
        self, rows: Sequence[Row], version: ServedVersion, *, cache_salt: str = ""
    ) -> Measured:
        """Compare a version that is loaded with its trainer and with the base model.

        Rows that are longer than the context are cut, and those of which no token counts then
        are left out. `cache_salt` keeps the rows' prefix cache from other tenants. Raises
        GenerationFailed, InvalidRequest for tokens that the model has not, and ShardUnavailable,
        also for a row without an answer within ROW_TIMEOUT_S.
        """
        rows = [row for row in map(self._cut, rows) if row.positions]
        versions = (version, None)
        try:
            async with asyncio.TaskGroup() as tasks:
                scoring = [
                    [tasks.create_task(self._score(row, each, cache_salt)) for each in versions]
                    for row in rows
                ]
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from errors
        trained = [logprob for row in rows for logprob in row.logprobs]
        served = [logprob for own, _ in scoring for logprob in own.result()]
        base = [logprob for _, other in scoring for logprob in other.result()]
        deltas = [abs(one - other) for one, other in zip(trained, served, strict=True)]
        effects = [abs(one - other) for one, other in zip(base, served, strict=True)]
        return Measured(
            rows=len(rows),
            tokens=len(served),
            logprob_delta_mean=_mean(deltas),
            logprob_delta_max=_largest(deltas),
            eval_loss=-_mean(served),
            base_eval_loss=-_mean(base),
            effect_mean=_mean(effects),
            trained_effect_mean=_trained_effect_mean(rows),
        )

    def _cut(self, row: Row) -> Row:
        token_ids = row.token_ids[: self._max_row_tokens]
        kept = [at for at, place in enumerate(row.positions) if 1 <= place < len(token_ids)]
        base = row.base_logprobs
        return Row(
            token_ids,
            [row.positions[at] for at in kept],
            [row.logprobs[at] for at in kept],
            None if base is None else [base[at] for at in kept],
        )

    async def _score(self, row: Row, version: ServedVersion | None, cache_salt: str) -> list[float]:
        """Log probabilities at the row's positions, in nats."""
        async with self._places:
            try:
                async with asyncio.timeout(ROW_TIMEOUT_S):
                    output = await self._generate(row.token_ids, version, cache_salt)
            except TimeoutError as error:
                raise ShardUnavailable(self._shard.name) from error
        scores = output.prompt_logprobs
        if len(scores) != len(row.token_ids):
            raise GenerationFailed(f"{self._shard.name} did not score all tokens of a row")
        logprobs = []
        for position in row.positions:
            chosen = scores[position].chosen
            if chosen is None or chosen.token_id != row.token_ids[position]:
                raise GenerationFailed(f"{self._shard.name} did not score the tokens of a row")
            logprobs.append(chosen.logprob)
        return logprobs

    async def _generate(
        self, token_ids: Sequence[int], version: ServedVersion | None, cache_salt: str
    ) -> Output:
        request = GenerationRequest(
            request_id=f"gate-{self._id}-{next(self._numbers)}",
            prompt=token_ids,
            # The engine scores what it is given, and must generate one token besides.
            sampling={
                "max_tokens": 1,
                "temperature": 0.0,
                "prompt_logprobs": 0,
                "detokenize": False,
            },
            stream=False,
            cache_salt=cache_salt,
        )
        prompt = await self._shard.render(token_ids)
        async with aclosing(self._shard.generate(request, prompt, version)) as outputs:
            async for output in outputs:
                return output  # the only one, since it is no stream
        raise GenerationFailed(f"{self._shard.name} ended the request without an answer")


def _trained_effect_mean(rows: Sequence[Row]) -> float | None:
    effects: list[float] = []
    for row in rows:
        if row.base_logprobs is None:
            return None
        pairs = zip(row.logprobs, row.base_logprobs, strict=True)
        effects += [abs(one - other) for one, other in pairs]
    return _mean(effects)


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values and _all_finite(values) else _odd(values)


def _largest(values: Sequence[float]) -> float:
    return max(values) if values and _all_finite(values) else _odd(values)


def _all_finite(values: Sequence[float]) -> bool:
    return all(map(math.isfinite, values))


def _odd(values: Sequence[float]) -> float:
    """Of nothing, or of values among which are some that cannot be added or compared."""
    return math.nan if values else 0.0
