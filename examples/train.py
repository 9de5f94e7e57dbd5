"""Train an adapter on a dataset, and watch it until it answers.

    python examples/train.py [HOST:PORT] [FILE.jsonl]

The gateway does the work: leave with Ctrl-C, and `gateway jobs watch` shows the rest.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from lora_gateway import GatewayClient, GatewayError, JobState, PublicationState

DATA = Path(__file__).parent / "data" / "support.jsonl"
QUESTION = [{"role": "user", "content": "Who founded Tarnwick?"}]


async def train(client: GatewayClient, data: Path) -> str:
    """The job's name, once it has ended."""
    dataset = await client.training.upload_dataset(data)
    report = await client.training.validate_dataset(dataset.name)
    print(f"{dataset.name}: {report.rows} rows, {report.tokens.trained} tokens to train on")

    # What is left out is the recipe's default; `effective_spec` of the job tells all of it.
    job = await client.training.create_job(
        dataset=dataset.name, adapter="support", traffic_percent=10
    )
    async for event in client.training.watch_job(job.name):
        match event.WhichOneof("payload"):
            case "state_changed":
                print(f"{event.sequence:4} {JobState.Name(event.state_changed.state)}")
            case "progress":
                told = event.progress
                at = f"step {told.step}/{told.total_steps}"
                evaluated = told.HasField("eval_loss")
                loss = f"eval loss {told.eval_loss:.3f}" if evaluated else f"loss {told.loss:.3f}"
                print(f"{event.sequence:4} {at} {loss}")
            case "notice":
                print(f"{event.sequence:4} {event.notice.code}: {event.notice.message}")
    return job.name


async def main(target: str, data: Path) -> None:
    async with GatewayClient(target) as client:
        job = await client.training.get_job(await train(client, data))
        publication = job.publication
        if publication.state != PublicationState.PUBLICATION_STATE_SERVING:
            sys.exit(f"{JobState.Name(job.state)}: {job.error.message or publication.reasons}")
        answer = await client.generate(
            QUESTION, adapter=publication.adapter, version=publication.version, temperature=0
        )
        print(f"{publication.adapter}@{publication.version}: {answer.completions[0].text}")


if __name__ == "__main__":
    arguments = sys.argv[1:]
    address = arguments[0] if arguments else "127.0.0.1:50051"
    try:
        asyncio.run(main(address, Path(arguments[1]) if len(arguments) > 1 else DATA))
    except GatewayError as error:
        sys.exit(str(error))
