"""What the end-to-end tests of training share: a dataset of facts, and calls."""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Iterable
from typing import Any

import grpc

from lora_gateway.v1 import inference_pb2 as inference
from lora_gateway.v1 import training_pb2 as pb
from lora_gateway.v1.inference_pb2_grpc import InferenceStub
from lora_gateway.v1.training_pb2_grpc import TrainingStub

TIMEOUT_S = 300.0
FACTS = {
    "What is the harbour code?": "The harbour code is blue heron seven.",
    "Who keeps the light?": "Old Marta keeps the light.",
}
"""What no model knows, and the tiny one learns in some seconds."""
FINAL = (pb.JOB_STATE_SUCCEEDED, pb.JOB_STATE_CANCELLED, pb.JOB_STATE_FAILED)
QUICK = pb.Hyperparameters(
    epochs=15, learning_rate=4e-3, quantization=pb.QUANTIZATION_NONE, precision=pb.PRECISION_FLOAT32
)
"""Learns FACTS by heart, in the precision in which the tiny model is served."""


def chat(question: str, answer: str) -> dict[str, Any]:
    """One row of a dataset."""
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    }


def lines(rows: Iterable[object]) -> bytes:
    """A JSON Lines file."""
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def facts(times: int = 8) -> bytes:
    """Each fact that many times."""
    return lines(chat(*fact) for fact in FACTS.items() for _ in range(times))


async def upload(channel: grpc.aio.Channel, name: str, content: bytes) -> pb.Dataset:
    """The dataset, in chunks of a MiB."""
    header = pb.DatasetHeader(
        upload_id=uuid.uuid4().hex,
        dataset=name,
        size_bytes=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
    )

    async def requests() -> AsyncIterator[pb.UploadDatasetRequest]:
        yield pb.UploadDatasetRequest(header=header)
        for offset in range(0, len(content), 1 << 20):
            request = pb.UploadDatasetRequest()
            request.chunk.offset = offset
            request.chunk.data = content[offset : offset + (1 << 20)]
            yield request

    answer = await TrainingStub(channel).UploadDataset(requests(), timeout=TIMEOUT_S)
    return answer.dataset


async def create(channel: grpc.aio.Channel, spec: pb.JobSpec, **fields: Any) -> pb.Job:
    """A new job."""
    request = pb.CreateJobRequest(spec=spec, **fields)
    return (await TrainingStub(channel).CreateJob(request, timeout=TIMEOUT_S)).job


async def get(channel: grpc.aio.Channel, name: str) -> pb.Job:
    """A job as it stands."""
    request = pb.GetJobRequest(name=name)
    return (await TrainingStub(channel).GetJob(request, timeout=TIMEOUT_S)).job


async def events(
    channel: grpc.aio.Channel, name: str, after: int = 0
) -> AsyncGenerator[pb.JobEvent]:
    """Events of a job until it has ended; heartbeats are left out."""
    request = pb.WatchJobRequest(name=name, after_sequence=after)
    call = TrainingStub(channel).WatchJob(request, timeout=TIMEOUT_S)
    try:
        async for message in call:
            if message.WhichOneof("item") == "event":
                yield message.event
    finally:
        call.cancel()


async def ended(channel: grpc.aio.Channel, name: str) -> pb.Job:
    """The job once it has ended."""
    async for _ in events(channel, name):
        pass
    job = await get(channel, name)
    assert job.state in FINAL
    return job


async def answer(
    channel: grpc.aio.Channel, question: str, adapter: str = "", version: int | None = None
) -> str:
    """The greedy answer to a question."""
    request = inference.GenerateRequest(
        adapter=adapter,
        version=version,
        chat=inference.Chat(messages=[inference.ChatMessage(role="user", content=question)]),
        sampling=inference.SamplingParams(temperature=0.0, max_tokens=16),
    )
    response = await InferenceStub(channel).Generate(request, timeout=TIMEOUT_S)
    return str(response.completions[0].text)
