"""What the gate measures in an engine, and what it says of it."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from dataclasses import replace

import pytest

from engine import gate as module
from engine.errors import GenerationFailed, InvalidRequest, ShardUnavailable
from engine.fake import Script
from engine.gate import Gate, Limits, Measured, Reason, Row, faults
from engine.generation import ServedVersion
from tests.engine.scoring_shard import ScoringShard, logprob

VERSION = ServedVersion("acme", "sql", 1, 7, "/sql", "digest")
CONTEXT = 16
GOOD = Measured(2, 5, 0.01, 0.04, 1.0, 2.0, 0.9, 1.0)


def row(*token_ids: int, positions: Sequence[int], off_by: float = 0.0) -> Row:
    """A row whose trainer says the same as the shard, but for a difference."""
    said = [logprob(token_ids[place], place, VERSION) + off_by for place in positions]
    base = [logprob(token_ids[place], place, None) + off_by for place in positions]
    return Row(list(token_ids), list(positions), said, base)


async def measure(shard: ScoringShard, *rows: Row) -> Measured:
    return await Gate(shard, CONTEXT).measure(rows, VERSION, cache_salt="acme")


async def test_losses_and_differences_are_means_over_all_tokens_not_over_rows() -> None:
    rows = [row(1, 2, 3, 4, positions=[1, 2, 3], off_by=0.1), row(5, 6, positions=[1], off_by=-0.5)]
    measured = await measure(ScoringShard(), *rows)
    places = [(2, 1), (3, 2), (4, 3), (6, 1)]
    served = [logprob(token, place, VERSION) for token, place in places]
    base = [logprob(token, place, None) for token, place in places]
    assert (measured.rows, measured.tokens) == (2, 4)
    assert measured.logprob_delta_mean == pytest.approx((3 * 0.1 + 0.5) / 4)
    assert measured.logprob_delta_max == pytest.approx(0.5)
    assert measured.eval_loss == pytest.approx(-sum(served) / 4)
    assert measured.base_eval_loss == pytest.approx(-sum(base) / 4)
    assert measured.effect_mean == pytest.approx(-sum(served) / 4)  # the base's are twice those
    assert measured.trained_effect_mean == pytest.approx(measured.effect_mean)
    assert measured.effect_ratio == pytest.approx(1.0), "a base that is off is none of its effect"


async def test_only_the_tokens_that_count_are_compared() -> None:
    shard = ScoringShard()
    shard.spoils = {2: math.nan}
    assert (await measure(shard, row(1, 2, 3, positions=[2]))).is_finite
    assert not (await measure(shard, row(1, 2, 3, positions=[1, 2]))).is_finite


async def test_each_row_is_scored_with_the_version_and_the_base_model_and_one_token_is_made() -> (
    None
):
    shard = ScoringShard()
    await measure(shard, row(1, 2, positions=[1]), row(3, 4, positions=[1]))
    assert [version for _, version in shard.asked].count(None) == 2 == len(shard.asked) // 2
    assert len({request.request_id for request, _ in shard.asked}) == 4
    for request, _ in shard.asked:
        assert request.sampling["max_tokens"] == 1
        assert request.sampling["prompt_logprobs"] == 0
        assert request.cache_salt == "acme" and not request.stream


async def test_a_few_rows_are_in_flight_at_once_and_no_more() -> None:
    shard = ScoringShard(Script(token_interval_s=0.001))
    await measure(shard, *(row(1, number, positions=[1]) for number in range(2, 20)))
    assert 1 < shard.most_running <= module.ROWS_AT_ONCE
    assert shard.running == set() and shard.aborted == []


async def test_rows_that_are_longer_than_the_context_are_cut_and_left_out_where_none_count() -> (
    None
):
    long = list(range(1, CONTEXT + 5))
    rows = [row(*long, positions=[3, CONTEXT - 2, CONTEXT - 1]), row(*long, positions=[CONTEXT])]
    shard = ScoringShard()
    measured = await measure(shard, *rows)
    assert (measured.rows, measured.tokens) == (1, 2)
    assert measured.logprob_delta_max == pytest.approx(0.0)
    assert measured.effect_ratio == pytest.approx(1.0)
    for request, _ in shard.asked:
        assert isinstance(request.prompt, list) and len(request.prompt) == CONTEXT - 1


@pytest.mark.parametrize("rows", [[], [Row([1, 2], [], [])], [Row([1, 2], [0], [-1.0])]])
async def test_without_a_token_to_compare_there_is_a_finding(rows: list[Row]) -> None:
    shard = ScoringShard()
    measured = await Gate(shard, CONTEXT).measure(rows, VERSION)
    assert measured.tokens == 0 and not shard.asked
    (fault,) = faults(measured, Limits())
    assert fault.reason is Reason.OTHER and "no rows" in fault.text


@pytest.mark.parametrize("drops", [1, 2])
async def test_positions_that_do_not_come_back_are_no_measurement(drops: int) -> None:
    shard = ScoringShard()
    shard.drops = drops
    with pytest.raises(GenerationFailed, match="did not score"):
        await measure(shard, row(1, 2, 3, positions=[1]))


async def test_scores_of_other_tokens_are_no_measurement() -> None:
    shard = ScoringShard()
    shard.swaps = True
    with pytest.raises(GenerationFailed, match="did not score the tokens"):
        await measure(shard, row(1, 2, 3, positions=[1]))


@pytest.mark.parametrize("error", [ShardUnavailable("shard-0"), GenerationFailed("no")])
async def test_what_the_shard_raises_comes_through(error: Exception) -> None:
    shard = ScoringShard()
    shard.fails = error
    with pytest.raises(type(error)):
        await measure(shard, row(1, 2, positions=[1]), row(1, 3, positions=[1]))
    with pytest.raises(InvalidRequest):
        await measure(ScoringShard(), row(1, 99, positions=[1]))


async def test_no_answer_in_time_is_the_shards_fault_and_leaves_no_request(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "ROW_TIMEOUT_S", 0.02)
    shard = ScoringShard(Script(token_interval_s=60.0))
    with pytest.raises(ShardUnavailable, match="shard-0"):
        await measure(shard, row(1, 2, positions=[1]))
    assert shard.running == set()


async def test_a_cancelled_gate_leaves_no_request() -> None:
    shard = ScoringShard(Script(token_interval_s=60.0))
    gating = asyncio.create_task(measure(shard, row(1, 2, positions=[1])))
    while not shard.running:
        await asyncio.sleep(0)
    gating.cancel()
    await asyncio.gather(gating, return_exceptions=True)
    assert shard.running == set() and shard.aborted


def test_within_its_limits_an_adapter_has_no_faults() -> None:
    assert faults(GOOD, Limits(0.01, 0.04, 0.5, 1.0, 0.9)) == []
    assert faults(GOOD, Limits()) == []


@pytest.mark.parametrize(
    ("limits", "reason", "says"),
    [
        (Limits(logprob_delta_mean=0.005), Reason.LOGPROB_DELTA, "max_logprob_delta_mean is 0.005"),
        (Limits(logprob_delta=0.03), Reason.LOGPROB_DELTA, "0.04 nats at the worst token"),
        (Limits(eval_loss_ratio=0.4), Reason.EVAL_LOSS, "max_eval_loss_ratio is 0.4"),
        (Limits(eval_loss=0.5), Reason.EVAL_LOSS, "max_eval_loss is 0.5"),
        (Limits(effect_ratio=0.95), Reason.EFFECT, "0.9 of it, and min_effect_ratio is 0.95"),
    ],
)
def test_each_limit_that_is_exceeded_is_said_with_the_value_and_what_to_do(
    limits: Limits, reason: Reason, says: str
) -> None:
    (fault,) = faults(GOOD, limits)
    assert fault.reason is reason
    assert says in fault.text and "publish.gate.m" in fault.text


def test_all_limits_that_are_exceeded_are_said() -> None:
    assert len(faults(GOOD, Limits(0.001, 0.001, 0.1, 0.1, 1.0))) == 5


def test_an_adapter_without_effect_is_a_fault() -> None:
    (fault,) = faults(replace(GOOD, effect_mean=0.0), Limits())
    assert fault.reason is Reason.EFFECT and fault.text.startswith("it changes nothing")


# Means of nats a token: trainer to engine, effect in the engine, effect in the trainer; and eval
# losses of version and base model. SmolLM2-135M, learned in 4 bits and served in bfloat16.
MEASURED = {
    "one step at 2e-6": (0.703, 0.056, 0.067, 4.158, 4.169),
    "one step at 2e-5": (0.699, 0.103, 0.124, 4.104, 4.169),
    "five steps at 2e-5": (0.563, 0.552, 0.625, 3.673, 4.169),
    "one step at 2e-4": (0.558, 1.011, 1.161, 3.466, 4.169),
    "six steps at 2e-4": (0.284, 2.814, 3.139, 1.463, 4.169),
    "unquantized, one step at 2e-6": (0.057, 0.060, 0.051, 4.164, 4.169),
}


@pytest.mark.parametrize("values", MEASURED.values(), ids=MEASURED)
@pytest.mark.parametrize("ignored", [False, True])
def test_an_adapter_that_has_learned_little_is_told_from_one_that_the_engine_ignores(
    values: tuple[float, ...], ignored: bool
) -> None:
    delta, effect, trained_effect, loss, base_loss = values
    if ignored:
        # What may be left is rounding. An adapter that is worth no more than twice that is not
        # told from one that works.
        effect, loss = 0.02, base_loss - 0.01
    # The defaults for what is learned in 4 bits; see `trainer/spec.py`.
    limits = Limits(logprob_delta_mean=1.0, eval_loss_ratio=1.0, effect_ratio=0.5)
    measured = Measured(8, 200, delta, 6.0, loss, base_loss, effect, trained_effect)
    found = faults(measured, limits)
    assert [fault.reason for fault in found] == ([Reason.EFFECT] if ignored else [])


def test_an_adapter_of_which_the_engine_applies_next_to_nothing_is_a_fault() -> None:
    measured = Measured(8, 200, 0.88, 6.0, 1.49, 1.50, 0.02, 0.9)
    (fault,) = faults(measured, Limits(logprob_delta_mean=1.0, effect_ratio=0.5))
    assert fault.reason is Reason.EFFECT
    assert "by 0.9 nats a token in the trainer and by 0.02 in the engine" in fault.text


async def test_a_trainer_that_does_not_tell_its_effect_is_not_asked_for_it() -> None:
    old = replace(row(1, 2, positions=[1]), base_logprobs=None)
    measured = await measure(ScoringShard(), old, row(3, 4, positions=[1]))
    assert measured.trained_effect_mean is None and measured.effect_ratio is None
    assert faults(measured, Limits(effect_ratio=1.0)) == []
    assert replace(GOOD, trained_effect_mean=0.0).effect_ratio is None


def test_a_base_model_without_loss_is_no_division_by_zero() -> None:
    (fault,) = faults(replace(GOOD, base_eval_loss=0.0), Limits(eval_loss_ratio=1.0))
    assert fault.reason is Reason.EVAL_LOSS


@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf])
async def test_an_engine_that_answers_in_no_numbers_is_told_from_a_trainer_that_does(
    odd: float,
) -> None:
    shard = ScoringShard()
    shard.spoils = {3: odd}
    rows = [row(1, 2, 3, positions=[1, 2])]
    (fault,) = faults(await measure(shard, *rows), Limits())
    assert fault.reason is Reason.OTHER and fault.text.startswith("the engine answers in NaN")
    measured = await measure(ScoringShard(), Row([1, 2, 3], [1, 2], [-1.0, odd]))
    assert not measured.is_finite
    (fault,) = faults(measured, Limits())
    assert "trainer's log probabilities" in fault.text
    measured = await measure(ScoringShard(), replace(rows[0], base_logprobs=[-1.0, odd]))
    (fault,) = faults(measured, Limits(effect_ratio=0.5))
    assert "trainer's log probabilities" in fault.text
