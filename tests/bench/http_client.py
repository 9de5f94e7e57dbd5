"""The client of vLLM's HTTP servers: aiohttp over one open connection to the address given."""

from __future__ import annotations

import json
import sys
from typing import Any

import aiohttp
import uvloop

from tests.bench.side import ONLY_WAY, serve_side, take_stdout
from tests.bench.workload import Stream, Workload

BASE_MODEL = "base"
"""What requests of the base model name, which has a name of its own there."""
COMPLETIONS = "/v1/completions"
LINE, END = b"data: ", b"[DONE]"
"""How an event begins, and what the last one holds."""


def completion_of(workload: Workload) -> dict[str, Any]:
    """The body of one request of the workload."""
    return {
        "model": workload.adapter or BASE_MODEL,
        "prompt": workload.prompt,
        "max_tokens": workload.tokens,
        "temperature": 0.0,
        "ignore_eos": True,
        "stream": workload.streaming,
    }


async def _run(address: str) -> None:
    async with aiohttp.ClientSession(f"http://{address}", raise_for_status=True) as session:

        async def stream(workload: Workload) -> Stream:
            async with session.post(COMPLETIONS, json=completion_of(workload)) as response:
                if not workload.streaming:
                    answer = await response.json()
                    yield answer["usage"]["completion_tokens"], _text(answer)
                    return
                # How many tokens an event holds is not told: one, for whoever waits for the first.
                async for line in response.content:
                    event = line.removeprefix(LINE).strip()
                    if event and event != END:
                        yield 1, _text(json.loads(event))

        await serve_side({ONLY_WAY: stream}, take_stdout())


def _text(answer: dict[str, Any]) -> str:
    (choice,) = answer["choices"]
    text: str = choice["text"]
    return text


if __name__ == "__main__":
    uvloop.run(_run(sys.argv[1]))
