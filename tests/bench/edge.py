"""What the gateway's own edge bears: workers over fake shards, without an engine.

How much a worker streams, how much several stream together on one port, and what the memory of an
open stream is. The exit code is 0 whenever it could measure: a missed target is printed as missed.

    python -m tests.bench.edge
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, aclosing, closing
from pathlib import Path

from engine.fake import FakeShard, Script
from engine.generation import GenerationRequest
from gateway.run_dir import run_dir
from tests.bench.edge_report import MANY_WORKERS, EdgeReport, EdgeRound, Memory, Point
from tests.bench.edge_side import EdgeSide, Tally
from tests.bench.h2load import STREAMING, UNARY, LoadFailed, h2load_running, run_h2load
from tests.bench.machine import Machine
from tests.bench.workload import Workload

TOKENS, IN_FLIGHT_EACH, CONNECTIONS_EACH = 32, 128, 16
"""In flight and connections are for each worker. The kernel deals connections out by chance, and
of so many each worker gets enough to be busy."""
PROMPT = tuple(range(100, 132))
STEP_S = 0.001
"""Of the shards: 128 streams are offered 128,000 tokens a second, which no worker keeps up with."""
WARM_UP_S = 2.0
FAKE_TOKENS = 1000
OPEN_STREAMS, OPEN_CONNECTIONS = 5000, 8
OPEN_TOKENS, OPEN_STEP_S = 30, 1.0
"""An open stream has a token every second, for long enough that all are open at once."""
FEW = Workload(PROMPT, "", requests=64, in_flight=64, tokens=2)
"""What a worker does before its memory is looked at: imports and buffers are not a stream's."""
OPEN_LOOKS = 5


class CallsFailed(Exception):
    """Calls ended otherwise than they should, or before all were open."""


def main() -> None:
    """Entry of the command."""
    options = _options()
    machine = Machine.here()
    method = "Generate" if options.unary else "GenerateStream"
    with tempfile.TemporaryDirectory(prefix="edge-") as logs, run_dir() as metrics:
        folder = Path(logs)
        points = _curve(folder, metrics, options) if options.workers else []
        memory = _memory(folder, metrics) if options.memory else None
    fake_us = asyncio.run(_fake_us())
    report = EdgeReport(
        *(machine, method, TOKENS, IN_FLIGHT_EACH, CONNECTIONS_EACH, STEP_S),
        *(fake_us, points, memory),
    )
    print(report.text())
    if options.json is not None:
        options.json.write_text(json.dumps(report.raw(), indent=1) + "\n")


def _curve(folder: Path, metrics: Path, options: argparse.Namespace) -> list[Point]:
    """Measure each number of workers in turns."""
    rounds: dict[int, list[EdgeRound]] = {workers: [] for workers in options.workers}
    with ExitStack() as owned:
        sides = []
        for workers in rounds:
            _say(f"starting {workers} workers on as many fake shards")
            side = EdgeSide(folder, metrics, workers=workers, shards=workers, step_s=STEP_S)
            sides.append(owned.enter_context(closing(side)))
        path = UNARY if options.unary else STREAMING
        for number in range(options.rounds):
            _say(f"round {number + 1} of {options.rounds}")
            for side in sides if number % 2 == 0 else reversed(sides):
                rounds[side.workers].append(_round(side, path, options.seconds))
    return [Point(workers, measured) for workers, measured in rounds.items()]


def _round(side: EdgeSide, path: str, seconds: float) -> EdgeRound:
    """Load the workers, and look at them twice meanwhile. Raises CallsFailed."""
    workers = side.workers
    in_flight, connections = workers * IN_FLIGHT_EACH, workers * CONNECTIONS_EACH
    workload = Workload(PROMPT, "", 0, in_flight, TOKENS)
    start = side.tallies()
    load = h2load_running(side.address, workload, path, connections=connections, threads=workers)
    with load as process:
        time.sleep(WARM_UP_S)
        begin, begin_s = side.tallies(), time.monotonic()
        time.sleep(seconds)
        end, end_s = side.tallies(), time.monotonic()
        if process.poll() is not None:
            raise LoadFailed(process.communicate()[0])
    _check(start, side.wait_idle(), in_flight)
    streams_each = [b.good - a.good for a, b in zip(begin, end, strict=True)]
    outputs = sum(b.outputs - a.outputs for a, b in zip(begin, end, strict=True))
    return EdgeRound(
        streams_each=streams_each,
        tokens=sum(b.tokens - a.tokens for a, b in zip(begin, end, strict=True)),
        # A stream has one more before its outputs, and one after them.
        messages=outputs + (2 * sum(streams_each) if path == STREAMING else 0),
        seconds=end_s - begin_s,
        processor_s=sum(b.processor_s - a.processor_s for a, b in zip(begin, end, strict=True)),
    )


def _check(before: Sequence[Tally], after: Sequence[Tally], in_flight: int) -> None:
    """All calls ended with OK and all tokens, but for those that were cut at the end."""
    codes = Counter[str]()
    for tally in after:
        codes.update(tally.codes)
    for tally in before:
        codes.subtract(tally.codes)
    tokens = sum(tally.tokens for tally in after) - sum(tally.tokens for tally in before)
    cut = codes["CANCELLED"]
    if cut > in_flight or codes["OK"] + cut != codes.total() or tokens != codes["OK"] * TOKENS:
        raise CallsFailed(f"{dict(codes)}, {tokens} tokens, {in_flight} were in flight")


def _memory(folder: Path, metrics: Path) -> Memory:
    """Open many streams at one worker that has done next to nothing yet. Raises CallsFailed."""
    _say(f"opening {OPEN_STREAMS} streams")
    workload = Workload(PROMPT, "", OPEN_STREAMS, OPEN_STREAMS, OPEN_TOKENS)
    side = EdgeSide(folder, metrics, workers=1, shards=1, step_s=OPEN_STEP_S)
    with closing(side), ThreadPoolExecutor(1) as thread:
        run_h2load(side.address, FEW, connections=OPEN_CONNECTIONS)
        (before,) = side.tallies(memory=True)
        load = thread.submit(run_h2load, side.address, workload, connections=OPEN_CONNECTIONS)
        while (tally := side.tallies()[0]).open < OPEN_STREAMS:
            if tally.good > FEW.requests or load.done():
                raise CallsFailed(f"{tally.open} were open when the first one ended")
            time.sleep(0.1)
        looks = []
        for _ in range(OPEN_LOOKS):
            looks += side.tallies(memory=True)
            time.sleep(OPEN_STEP_S)
        if min(look.open for look in looks) < OPEN_STREAMS:
            raise CallsFailed("the first one ended too soon")
        load.result()
        (after,) = side.wait_idle()
    asked = {"OK": FEW.requests + OPEN_STREAMS}
    if after.codes != asked:
        raise CallsFailed(f"ended with {after.codes}, and should have with {asked}")
    open_bytes = max(look.uss_bytes for look in looks)
    return Memory(OPEN_STREAMS, OPEN_CONNECTIONS, before.uss_bytes, open_bytes)


async def _fake_us() -> float:
    """Processor time of a fake shard for an output, with nothing around it, in microseconds."""
    shard = FakeShard(script=Script(step_interval_s=STEP_S))
    prompt = await shard.render(PROMPT)

    async def read(number: int) -> None:
        request = GenerationRequest(f"{number}", PROMPT, {"max_tokens": FAKE_TOKENS}, stream=True)
        async with aclosing(shard.generate(request, prompt, None)) as outputs:
            async for _ in outputs:
                pass

    begin_s = time.process_time()
    await asyncio.gather(*map(read, range(IN_FLIGHT_EACH)))
    return (time.process_time() - begin_s) / shard.outputs * 1e6


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.edge", description=__doc__)
    parser.add_argument(
        "--workers", type=int, nargs="*", default=[1, 2, MANY_WORKERS], help="numbers to compare"
    )
    parser.add_argument("--rounds", type=int, default=3, help="of each number of workers")
    parser.add_argument("--seconds", type=float, default=5, help="of each round")
    parser.add_argument("--unary", action="store_true", help="Generate in place of streams")
    parser.add_argument(
        "--memory", action=argparse.BooleanOptionalAction, default=True, help="of open streams, too"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    return parser.parse_args()


def _say(what: str) -> None:
    print(f"edge: {what}", flush=True)


if __name__ == "__main__":
    main()
