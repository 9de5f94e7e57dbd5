"""The client of the gateway's side: grpc.aio over one open channel to the address given."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import grpc
import uvloop

from lora_gateway.v1 import inference_pb2 as pb
from lora_gateway.v1.inference_pb2_grpc import InferenceStub
from tests.bench.side import ONLY_WAY, serve_side, take_stdout
from tests.bench.workload import Stream, Workload

if TYPE_CHECKING:
    from lora_gateway.v1.inference_pb2_grpc import InferenceAsyncStub


def request_of(workload: Workload) -> pb.GenerateRequest:
    """One request of the workload."""
    request = pb.GenerateRequest(
        adapter=workload.adapter,
        sampling=pb.SamplingParams(max_tokens=workload.tokens, temperature=0.0, ignore_eos=True),
    )
    if isinstance(workload.prompt, str):
        request.text = workload.prompt
    else:
        request.token_ids.ids.extend(workload.prompt)
    return request


async def _run(address: str) -> None:
    async with grpc.aio.insecure_channel(address) as channel:
        stub: InferenceAsyncStub = InferenceStub(channel)

        async def stream(workload: Workload) -> Stream:
            request = request_of(workload)
            if not workload.streaming:
                response = await stub.Generate(request)
                yield response.usage.completion_tokens, response.completions[0].text
                return
            # How many tokens a delta holds is not told, only the sum at the end: so one for
            # the first delta, and the rest at the finish.
            counted = 0
            async for event in stub.GenerateStream(request):
                if event.HasField("delta"):
                    counted, before = 1, counted
                    yield counted - before, event.delta.text
                elif event.HasField("finished"):
                    yield event.finished.usage.completion_tokens - counted, ""

        await serve_side({ONLY_WAY: stream}, take_stdout())


if __name__ == "__main__":
    uvloop.run(_run(sys.argv[1]))
