"""Streams rest after writes that took long."""

from __future__ import annotations

import time

import pytest

from gateway import pacing
from gateway.pacing import BUSY_S, LONGEST_REST_S, rest_s
from lora_gateway.v1 import inference_pb2 as pb
from tests.gateway.conftest import FakeGateway


@pytest.mark.parametrize(
    ("write_s", "expected_s"),
    [
        (0.0, 0.0),
        (BUSY_S / 2, 0.0),
        (BUSY_S, BUSY_S),
        (LONGEST_REST_S / 2, LONGEST_REST_S / 2),
        (60.0, LONGEST_REST_S),
    ],
)
def test_a_rest_is_as_long_as_a_write_that_says_busy(write_s: float, expected_s: float) -> None:
    assert rest_s(write_s) == expected_s


async def test_a_stream_rests_between_its_tokens_and_not_before_its_end(
    fake: FakeGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens, pause_s = 5, 0.03
    writes_s: list[float] = []

    def always(write_s: float) -> float:
        writes_s.append(write_s)
        return pause_s

    monkeypatch.setattr(pacing, "rest_s", always)
    request = pb.GenerateRequest(text="x", sampling=pb.SamplingParams(max_tokens=tokens))
    began_s = time.monotonic()
    events = [event.WhichOneof("event") async for event in fake.stub.GenerateStream(request)]
    assert time.monotonic() - began_s >= (tokens - 1) * pause_s
    assert events == ["started", *["delta"] * tokens, "finished"]
    assert len(writes_s) == tokens - 1
    assert min(writes_s) > 0
