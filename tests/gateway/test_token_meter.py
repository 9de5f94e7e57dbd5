"""Tokens are counted by adapter, and told in batches."""

from __future__ import annotations

import asyncio

import pytest

from engine.ring import AdapterKey
from gateway import token_meter
from gateway.call import BASE_MODEL_LABEL, Call, Principal
from gateway.token_meter import TokenMeter, Tokens

ALPHA = AdapterKey("acme", "alpha")


def call(adapter: str | None, prompt_tokens: int = 0, completion_tokens: int = 0) -> Call:
    ended = Call("Generate", Principal("acme"), task=None)
    ended.adapter = adapter
    ended.prompt_tokens, ended.completion_tokens = prompt_tokens, completion_tokens
    return ended


async def test_tokens_come_by_adapter_in_one_batch_each_interval(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(token_meter, "INTERVAL_S", 0.01)
    batches: list[Tokens] = []
    meter = TokenMeter(batches.append)
    running = asyncio.create_task(meter.run())
    meter.count(call("alpha", 10, 5))
    meter.count(call("alpha", 1, 0))
    meter.count(call(BASE_MODEL_LABEL, 7, 1))
    meter.count(call(None, 3, 3))  # it named no adapter that there is
    meter.count(call("beta"))  # it came to nothing
    await asyncio.sleep(0.05)
    assert batches == [{ALPHA: 16, None: 8}], "and nothing where there is nothing"
    meter.count(call("alpha", 1, 1))
    await asyncio.sleep(0.05)
    assert batches[1:] == [{ALPHA: 2}]
    running.cancel()
