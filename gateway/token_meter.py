"""Tokens of ended requests by adapter, counted by a worker and sent to the host in batches."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Mapping

from engine.ring import AdapterKey
from gateway.call import BASE_MODEL_LABEL, Call

INTERVAL_S = 1.0
"""Between two batches. The plan that they lead to is made anew every few seconds."""

Tokens = Mapping[AdapterKey | None, int]
"""Of prompts and completions; None is the base model."""


class TokenMeter:
    """Counts what the host plans replicas by (`engine/replication.py`)."""

    def __init__(self, send: Callable[[Tokens], None]) -> None:
        """`send` gets each batch for its own. It must not wait."""
        self._send = send
        self._tokens: Counter[AdapterKey | None] = Counter()

    def count(self, call: Call) -> None:
        """Count what a call has used, if it has."""
        tokens = call.prompt_tokens + call.completion_tokens
        if call.adapter is not None and tokens:
            base = call.adapter == BASE_MODEL_LABEL
            key = None if base else AdapterKey(call.principal.tenant, call.adapter)
            self._tokens[key] += tokens

    async def run(self) -> None:
        """Send what is counted after each interval, until cancelled."""
        while True:
            await asyncio.sleep(INTERVAL_S)
            if self._tokens:
                tokens, self._tokens = self._tokens, Counter()
                self._send(tokens)
