"""A worker without an engine: all of the gateway's edge, over fake shards, in one process.

    python -m tests.bench.edge_worker ADDRESS RUN_DIR SHARDS STEP_INTERVAL_S

It has what a worker has (`gateway/worker.py`) but for a host: the server and its interceptor,
admission, placement, codec, metrics in the files of multiprocess mode. Each line that it reads is
answered with its counts, as JSON; it ends when its owner closes the pipe.
"""

from __future__ import annotations

import asyncio
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gateway.settings import Settings, prepare_environment
from tests.bench.side import take_stdout

if TYPE_CHECKING:
    from engine.fake import FakeShard
    from gateway.call import Call
    from gateway.server import GatewayServer
    from gateway.token_meter import TokenMeter

MAX_IN_FLIGHT = 8192
"""More than any round has: nothing is shed."""
VOCAB_SIZE, MAX_MODEL_LEN = 1024, 512
STOP_S = 5.0


def main() -> None:
    """Entry of the process."""
    answer = take_stdout()
    address, run_dir, shards, step_interval_s = sys.argv[1:]
    settings = Settings.from_argv(["--listen", address])
    prepare_environment(settings, Path(run_dir))  # before anything of ours imports its metrics

    import uvloop

    uvloop.run(_run(settings, int(shards), float(step_interval_s), answer))


class _Tally:
    """What became of the calls."""

    def __init__(self, shards: list[FakeShard]) -> None:
        self._shards = shards
        self._codes = Counter[str]()
        self._tokens = 0

    def count(self, call: Call, code: str) -> None:
        """One call has ended."""
        self._codes[code] += 1
        if code == "OK":
            self._tokens += call.completion_tokens

    def told(self) -> dict[str, object]:
        """All of it, so far. `open` streams have had a token or wait for the first one."""
        is_open = sum(len(shard.running) for shard in self._shards)
        outputs = sum(shard.outputs for shard in self._shards)
        codes = dict(self._codes)
        return {"codes": codes, "tokens": self._tokens, "outputs": outputs, "open": is_open}


async def _run(
    settings: Settings, shards: int, step_interval_s: float, answer: Callable[[Any], None]
) -> None:
    from engine.fake import FakeShard, Script
    from gateway.token_meter import TokenMeter

    fakes = [
        FakeShard(f"shard-{number}", Script(step_interval_s=step_interval_s))
        for number in range(shards)
    ]
    tally, meter = _Tally(fakes), TokenMeter(lambda tokens: None)
    metering = asyncio.create_task(meter.run())
    server = _server(settings, fakes, tally, meter)
    server.bind(settings.listen, settings)
    await server.start()
    await server.health.serving()
    answer("ready")
    while await asyncio.to_thread(sys.stdin.readline):
        answer(tally.told())
    await server.stop(STOP_S)
    metering.cancel()


def _server(
    settings: Settings, fakes: list[FakeShard], tally: _Tally, meter: TokenMeter
) -> GatewayServer:
    from engine.pool import ServedView, ShardPool
    from engine.residents import Residents
    from gateway import metrics
    from gateway.adapter_labels import AdapterLabels
    from gateway.admission import Admission
    from gateway.inference import Inference
    from gateway.server import GatewayServer
    from gateway.tracing import Tracing
    from gateway.wrap import Edge
    from lora_gateway.v1 import inference_pb2 as pb
    from tests.engine.open_slots import open_slots

    for fake in fakes:
        metrics.know_shard(fake.name)

    def ended(call: Call, code: str, end_s: float) -> None:
        metrics.record(call, code, end_s)
        meter.count(call)
        tally.count(call, code)

    async def in_core(lora_int_id: int) -> int:
        return 0

    residents = {fake.name: Residents(lambda key: None, in_core, open_slots()) for fake in fakes}
    pool = ShardPool(fakes, residents, ServedView())
    admission = Admission(MAX_IN_FLIGHT)
    edge = Edge(
        admission,
        Tracing(None),
        settings.default_unary_deadline_s,
        settings.default_stream_deadline_s,
        ended,
        running=metrics.inflight.track_inprogress,
    )
    model = pb.Model(
        base_model="fake",
        vocab_size=VOCAB_SIZE,
        limits=pb.ModelLimits(max_model_len=MAX_MODEL_LEN),
        defaults=pb.ModelDefaults(max_tokens=16, temperature=0.7),
    )
    labels = AdapterLabels(frozenset())
    return GatewayServer(edge, Inference(pool, admission, model, labels), settings)


if __name__ == "__main__":
    main()
