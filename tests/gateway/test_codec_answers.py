"""The engine's answers as messages: all that was asked for, and nothing empty."""

from __future__ import annotations

import pytest

from engine.generation import Delta, FinishReason, PositionLogprobs, TokenLogprob
from gateway.codec import encode_completion, encode_delta, encode_end, encode_positions
from lora_gateway.v1 import inference_pb2 as pb

CHOSEN = TokenLogprob(token_id=5, logprob=-0.5, rank=2, token="five")
LIKELIEST = TokenLogprob(token_id=6, logprob=-0.25, rank=1, token="six")
POSITION = PositionLogprobs(CHOSEN, [LIKELIEST, CHOSEN])
ENCODED = pb.PositionLogprobs(
    chosen=pb.TokenLogprob(token_id=5, logprob=-0.5, rank=2, token="five"),
    top=[
        pb.TokenLogprob(token_id=6, logprob=-0.25, rank=1, token="six"),
        pb.TokenLogprob(token_id=5, logprob=-0.5, rank=2, token="five"),
    ],
)


def test_a_delta_that_holds_nothing_is_no_message() -> None:
    """Its tokens are not asked for, and their text is not there yet."""
    assert encode_delta(Delta(0, "", [5]), token_ids=False) is None


@pytest.mark.parametrize(
    ("delta", "token_ids", "expected"),
    [
        (Delta(1, "hi", [5, 6]), False, pb.GenerationDelta(index=1, text="hi")),
        (Delta(1, "", [5]), True, pb.GenerationDelta(index=1, token_ids=[5])),
        (
            Delta(0, "", [5], [POSITION]),
            False,
            pb.GenerationDelta(logprobs=pb.Logprobs(positions=[ENCODED])),
        ),
        (
            Delta(2, "hi", [5], [POSITION]),
            True,
            pb.GenerationDelta(
                index=2, text="hi", token_ids=[5], logprobs=pb.Logprobs(positions=[ENCODED])
            ),
        ),
    ],
    ids=["text", "token ids", "log probabilities", "all"],
)
def test_a_delta_holds_what_was_gained_and_asked_for(
    delta: Delta, token_ids: bool, expected: pb.GenerationDelta
) -> None:
    message = encode_delta(delta, token_ids=token_ids)
    assert message == pb.GenerateStreamResponse(delta=expected)


@pytest.mark.parametrize("reason", FinishReason)
def test_each_finish_reason_has_its_value(reason: FinishReason) -> None:
    delta = Delta(1, "hi", [5], finish_reason=reason)
    expected = pb.FinishReason.Value(f"FINISH_REASON_{reason.name}")
    assert encode_end(delta) == pb.CompletionEnd(index=1, finish_reason=expected)
    assert encode_completion(delta, token_ids=False) == pb.Completion(
        index=1, text="hi", finish_reason=expected
    )


def test_every_finish_reason_of_the_contract_can_be_sent() -> None:
    ours = {f"FINISH_REASON_{reason.name}" for reason in FinishReason}
    assert ours == set(pb.FinishReason.keys()) - {"FINISH_REASON_UNSPECIFIED"}


@pytest.mark.parametrize(
    ("stop", "field", "value"),
    [
        ("END", "stop_text", "END"),
        ("", "stop_text", ""),
        (7, "stop_token_id", 7),
        (0, "stop_token_id", 0),
    ],
)
def test_what_stopped_a_completion_is_told(stop: int | str, field: str, value: object) -> None:
    delta = Delta(0, "hi", [5], finish_reason=FinishReason.STOP, stop=stop)
    for message in (encode_end(delta), encode_completion(delta, token_ids=False)):
        assert message.WhichOneof("stop") == field
        assert getattr(message, field) == value


def test_a_completion_that_met_no_stop_tells_none() -> None:
    delta = Delta(0, "hi", [5], finish_reason=FinishReason.STOP)
    assert encode_end(delta).WhichOneof("stop") is None


def test_a_completion_holds_what_was_asked_for() -> None:
    delta = Delta(0, "hi", [5], [POSITION], FinishReason.STOP)
    message = encode_completion(delta, token_ids=True)
    assert list(message.token_ids) == [5]
    assert list(message.logprobs.positions) == [ENCODED]
    plain = encode_completion(Delta(0, "hi", [5], finish_reason=FinishReason.STOP), token_ids=False)
    assert not plain.token_ids
    assert not plain.HasField("logprobs")


def test_a_prompts_first_position_is_empty() -> None:
    first, second = encode_positions([PositionLogprobs(None, ()), POSITION])
    assert not first.HasField("chosen") and not first.top
    assert second == ENCODED
