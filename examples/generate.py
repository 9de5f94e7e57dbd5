"""Ask the base model and the adapter `pirate` the same question.

    python examples/generate.py [HOST:PORT]

`make serve` starts a gateway that has both.
"""

from __future__ import annotations

import asyncio
import sys

from lora_gateway import FinishReason, GatewayClient, GatewayError, NotFound

QUESTION = [{"role": "user", "content": "How do I find the nearest harbour?"}]


async def ask(client: GatewayClient, adapter: str) -> None:
    answer = await client.generate(QUESTION, adapter=adapter, max_tokens=64, temperature=0)
    completion = answer.completions[0]
    served_by = answer.served_by
    print(f"--- {adapter or 'base model'}, version {served_by.version}, on {served_by.shard}")
    print(completion.text)
    print(
        f"({answer.usage.prompt_tokens} + {answer.usage.completion_tokens} tokens, "
        f"{FinishReason.Name(completion.finish_reason)}, {answer.timings.total_ms:.0f} ms)\n"
    )


async def main(target: str) -> None:
    async with GatewayClient(target) as client:
        model = await client.get_model()
        print(f"{model.base_model} ({model.architecture}, {model.dtype})\n")
        await ask(client, adapter="")
        await ask(client, adapter="pirate")
        try:
            await ask(client, adapter="suport")
        except NotFound as error:
            print(f"as it should be: {error}")


if __name__ == "__main__":
    try:
        asyncio.run(main(sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:50051"))
    except GatewayError as error:
        sys.exit(str(error))
