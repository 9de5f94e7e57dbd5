"""Stream an answer of the base model, then one of the adapter `pirate`.

    python examples/stream.py [HOST:PORT]

`make serve` starts a gateway that has both.
"""

from __future__ import annotations

import asyncio
import sys

from lora_gateway import GatewayClient, GatewayError

QUESTION = [{"role": "user", "content": "Tell me about the sea."}]


async def print_answer(client: GatewayClient, adapter: str) -> None:
    print(f"--- {adapter or 'base model'}")
    async with client.stream(QUESTION, adapter=adapter, max_tokens=64, temperature=0) as stream:
        async for text in stream.text():
            print(text, end="", flush=True)
    timings = stream.finished.timings
    print(f"\n(first token after {timings.time_to_first_token_ms:.0f} ms)\n")


async def print_beginning(client: GatewayClient, adapter: str, pieces: int) -> None:
    """Leaving the block cancels the call, and the engine stops at once."""
    async with client.stream(QUESTION, adapter=adapter) as stream:
        async for text in stream.text():
            print(text, end="", flush=True)
            pieces -= 1
            if pieces == 0:
                break
    print(" ... enough.")


async def main(target: str) -> None:
    async with GatewayClient(target) as client:
        await print_answer(client, adapter="")
        await print_answer(client, adapter="pirate")
        await print_beginning(client, adapter="pirate", pieces=5)


if __name__ == "__main__":
    try:
        asyncio.run(main(sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:50051"))
    except GatewayError as error:
        sys.exit(str(error))
