"""The screenshots of the status page in docs/: of a real gateway at work. `make screenshot`.

Two shards of the tiny model serve four adapters, one of them with a canary, while another is
trained. Takes some minutes on two cores. Needs Chromium.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import random
import sys
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
from PIL import Image

from engine.models import resolve_model
from lora_gateway.v1 import adapters_pb2 as ad
from lora_gateway.v1 import inference_pb2 as inference
from lora_gateway.v1 import training_pb2 as pb
from lora_gateway.v1.adapters_pb2_grpc import AdaptersStub
from lora_gateway.v1.inference_pb2_grpc import InferenceStub
from lora_gateway.v1.training_pb2_grpc import TrainingStub
from tests.chromium import find_chromium, open_tab
from tests.e2e import training
from tests.e2e.gateway_process import gateway_process
from tests.tiny_adapter import write_tiny_adapter

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PICTURES = {"status-page.png": False, "status-page-dark.png": True}
"""Name, and whether it is in dark colours."""
WIDTH, HEIGHT = 1440, 900
COLOURS = 256
MOST_BYTES = 300_000

ADAPTERS = {"billing": 8, "legal": 1, "pirate": 3, "sql": 5}
"""Name, and its share of the requests."""
CALLERS = 20
LOAD_S = 75.0
"""A minute of rates, and some more."""
BEGUN, LEARNED = 0.2, 0.3
"""Of the training's steps, when the load begins and when the picture is taken."""
TRAINING_TIMEOUT_S = 300.0


async def call_again_and_again(channel: grpc.aio.Channel, seed: int) -> None:
    """One caller, who rests between two calls."""
    dice = random.Random(seed)
    stub = InferenceStub(channel)
    while True:
        (adapter,) = dice.choices(list(ADAPTERS), list(ADAPTERS.values()))
        request = inference.GenerateRequest(
            adapter=adapter,
            text=f"Once upon a time, {dice.random()}",
            session_id=f"caller-{dice.randrange(1000)}",
            sampling=inference.SamplingParams(
                max_tokens=dice.randrange(32, 320), temperature=0.8, ignore_eos=True
            ),
        )
        async for _ in stub.GenerateStream(request, timeout=60):
            pass
        await asyncio.sleep(dice.expovariate(4.0))


@contextlib.asynccontextmanager
async def load(channel: grpc.aio.Channel) -> AsyncIterator[None]:
    """Callers at work, until the end of the block."""
    calls = [asyncio.create_task(call_again_and_again(channel, seed)) for seed in range(CALLERS)]
    try:
        yield
        for call in calls:
            if call.done():
                call.result()
    finally:
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)


async def split_traffic(channel: grpc.aio.Channel, folder: Path) -> None:
    """A canary of `sql`, guarded."""
    stub = AdaptersStub(channel)
    await stub.CreateAdapterVersion(
        ad.CreateAdapterVersionRequest(adapter="sql", source_uri=str(folder), wait=True), timeout=60
    )
    await stub.SetTraffic(
        ad.SetTrafficRequest(
            adapter="sql",
            splits=[
                ad.TrafficSplit(version=1, weight=80),
                ad.TrafficSplit(version=2, weight=20),
            ],
            guard=ad.TrafficGuard(version=2, max_error_ratio=0.2, min_requests=20),
        ),
        timeout=60,
    )


async def train(channel: grpc.aio.Channel) -> None:
    """A job that has learned some of the support desk's answers."""
    data = await asyncio.to_thread((ROOT / "examples/data/support.jsonl").read_bytes)
    await training.upload(channel, "support", data)
    await training.create(
        channel,
        pb.JobSpec(
            dataset="support",
            adapter="support",
            data=pb.DataSpec(eval_fraction=0.1),
            backend=pb.BACKEND_PEFT,
            hyperparameters=pb.Hyperparameters(
                epochs=12,
                learning_rate=8e-4,
                micro_batch_size=4,
                gradient_accumulation=1,
                quantization=pb.QUANTIZATION_NONE,
                precision=pb.PRECISION_FLOAT32,
            ),
        ),
        job_id="support-1",
    )


async def until_learned(channel: grpc.aio.Channel, share: float) -> None:
    """Wait until the job has done this share of its steps."""
    async with asyncio.timeout(TRAINING_TIMEOUT_S):
        async for event in training.events(channel, "support-1"):
            progress = event.progress
            if progress.total_steps and progress.step >= share * progress.total_steps:
                return


async def take(program: str, address: str, url: str, sources: Path) -> dict[str, bytes]:
    """The pictures, as PNGs."""
    async with (
        grpc.aio.insecure_channel(address) as channel,
        open_tab(program, url) as tab,
    ):
        await tab.show(width=WIDTH, height=HEIGHT)
        await split_traffic(channel, sources / "sql-2")
        await train(channel)
        await until_learned(channel, BEGUN)  # under the load its start takes minutes, on two cores
        async with load(channel):
            await asyncio.gather(asyncio.sleep(LOAD_S), until_learned(channel, LEARNED))
            pictures = {}
            for name, dark in PICTURES.items():
                await tab.show(width=WIDTH, height=HEIGHT, dark=dark)
                await tab.wait_for("document.getElementById('link').textContent === 'live'")
                pictures[name] = await tab.screenshot()
        await TrainingStub(channel).CancelJob(pb.CancelJobRequest(name="support-1"))
        assert not tab.problems, tab.problems
    return pictures


def optimised(picture: bytes) -> bytes:
    """The same in few colours."""
    content = io.BytesIO()
    image = Image.open(io.BytesIO(picture)).convert("RGB")
    image.quantize(COLOURS, dither=Image.Dither.NONE).save(content, "PNG", optimize=True)
    return content.getvalue()


def main() -> int:
    """Write the pictures; returns the exit code."""
    program = find_chromium()
    if program is None:
        print("screenshot: no Chromium is installed here", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sources = folder / "sources"
        model = resolve_model("tiny", folder)
        for seed, adapter in enumerate([*ADAPTERS, "sql-2"]):
            write_tiny_adapter(sources / adapter, model, seed=seed, rank=8)
        with gateway_process(
            folder,
            workers=2,
            adapters={adapter: sources / adapter for adapter in ADAPTERS},
            extra=["--shards", "2", "--adapter-source-allow", str(sources)],
        ) as gateway:
            url = gateway.metrics_url.removesuffix("metrics")
            pictures = asyncio.run(take(program, gateway.address, url, sources))
    for file, picture in pictures.items():
        content = optimised(picture)
        assert len(content) <= MOST_BYTES, f"{file} has {len(content)} bytes"
        (DOCS / file).write_bytes(content)
        print(f"docs/{file}: {len(content) / 1000:.0f} kB")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
