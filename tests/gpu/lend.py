"""Lends one GPU to a training process and back, through the keeper and vLLM's sleep mode.

    PYTHONPATH=. python tests/gpu/lend.py [--tiny] [--cpu] [--loans 3] [--train-s 20]

Needs no network: Llama-3.1-8B's shape with random weights. Prints for each loan how long the core
took to fall asleep and to wake up, what that freed, what a process that trains took meanwhile, and
whether base model and adapters answer in the same tokens as before. The last loan is given back
while another process still has the memory: then the core cannot wake up, and another one comes.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from engine.core import ClientSlot, EngineOptions
from engine.core_death import CoreDeath
from engine.errors import ShardUnavailable
from engine.generation import GenerationRequest, ServedVersion
from engine.screening import Screening
from engine.shard import VllmShard
from gateway.keeper import ShardKeeper
from gateway.loan import Loan

ROOT = Path(__file__).parents[2]
ADAPTERS, RANK, TOKENS = 4, 16, 24
PROMPTS = ("w5 w6 w7 w8 w9 w10", "w500 w77 w3", " ".join(f"w{at}" for at in range(20, 320)))
GIB = 1024**3
TRAINER = """
import sys, time, torch
share, seconds = float(sys.argv[1]), float(sys.argv[2])
free, total = torch.cuda.mem_get_info()
held = torch.empty(int(share * free), dtype=torch.uint8, device="cuda").fill_(255)  # NaN, as floats
print(held.numel(), flush=True)
end = time.monotonic() + seconds
a = torch.randn(2048, 2048, device="cuda", dtype=torch.bfloat16)
while time.monotonic() < end:
    (a @ a).sum().item()
"""
"""Takes a share of what is free, and computes."""


def main() -> None:
    """All loans, one after the other."""
    parser = argparse.ArgumentParser(description="Lend a GPU to training, and take it back.")
    parser.add_argument("--tiny", action="store_true", help="a tiny model")
    parser.add_argument("--cpu", action="store_true", help="no GPU: the core ends and starts")
    parser.add_argument("--loans", type=int, default=3)
    parser.add_argument("--train-s", type=float, default=20.0)
    parser.add_argument("--utilization", type=float, default=0.9)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "lend")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    offer_plugin(options.folder)
    for name, value in {
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        "VLLM_ENGINE_READY_TIMEOUT_S": "600",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "PROMETHEUS_MULTIPROC_DIR": str(options.folder),
        **({"TORCHDYNAMO_DISABLE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"} if options.cpu else {}),
    }.items():
        os.environ.setdefault(name, value)
    make_model(options.folder, tiny=options.tiny or options.cpu)
    asyncio.run(Story(options).run())


def offer_plugin(folder: Path) -> None:
    """Have vLLM find `engine/core_plugin.py` where this package is not installed."""
    facts = folder / "site" / "lora_gateway-0.dist-info"
    facts.mkdir(parents=True, exist_ok=True)
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: lora-gateway\nVersion: 0\n")
    points = "[vllm.general_plugins]\nlora_gateway = engine.core_plugin:register\n"
    (facts / "entry_points.txt").write_text(points)
    paths = [str(ROOT), str(facts.parent), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    sys.path[:0] = paths[:2]


def make_model(folder: Path, *, tiny: bool) -> None:
    """In another process, which gives the GPU back when it ends."""
    if (folder / "made").exists():
        return
    code = (
        "from pathlib import Path; from tests.gpu.random_llama import write_model; "
        "from tests.tiny_adapter import write_tiny_adapter; "
        f"folder = Path({str(folder)!r}); write_model(folder / 'model', tiny={tiny}); "
        f"[write_tiny_adapter(folder / f'a{{n}}', folder / 'model', seed=n, rank={RANK}) "
        f"for n in range(1, {ADAPTERS} + 1)]; (folder / 'made').touch()"
    )
    begin_s = time.monotonic()
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
    print(f"model and {ADAPTERS} adapters made in {time.monotonic() - begin_s:.1f} s", flush=True)


class Story:
    """Follows the shard as the control plane does, with adapters of its own."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.folder: Path = options.folder
        self.loaded_s = 0.0
        self.next_id = 1
        self.same = True
        """Whether it answered after each loan what it had answered before."""
        self.keeper = ShardKeeper(
            "shard-0",
            EngineOptions(
                model_path=self.folder / "model",
                served_model_name="random",
                dtype="float32" if options.cpu else "bfloat16",
                quantization=None,
                max_model_len=2048,
                max_num_seqs=64,
                gpu_memory_utilization=options.utilization,
                max_loras=ADAPTERS,
                max_cpu_loras=2 * ADAPTERS,
                max_lora_rank=RANK,
                sleeps=not options.cpu,
            ),
            contextlib.nullcontext,
            120.0,
            Path(tempfile.mkdtemp(prefix="lend-run-")),
            Screening(),
        )
        self.versions: list[ServedVersion] = []

    # --- as all who use a shard do ----------------------------------------------------------

    def lose(self, shard: str, death: CoreDeath) -> None:
        """Nobody uses it any more."""
        self.versions = []

    async def prepare(self, shard: VllmShard) -> None:
        """Load the adapters, under ids that were never used."""
        begin_s = time.monotonic()
        for number in range(1, ADAPTERS + 1):
            path = str(self.folder / f"a{number}")
            version = ServedVersion("t", f"a{number}", 1, self.next_id, path, str(number))
            self.next_id += 1
            await shard.load(version)
            self.versions.append(version)
        self.loaded_s = time.monotonic() - begin_s

    async def admit(self, shard: str, take_slot: Callable[[], ClientSlot]) -> None:
        """There are no workers."""

    # --- the story --------------------------------------------------------------------------

    async def run(self) -> None:
        """Start, lend several times, and lend to one that does not give back."""
        begin_s = time.monotonic()
        await self.keeper.start()
        print(f"core started in {time.monotonic() - begin_s:.1f} s", flush=True)
        self.keeper.settled = True
        assert self.keeper.shard is not None
        await self.prepare(self.keeper.shard)
        keeping = asyncio.create_task(self.keeper.keep(self))
        try:
            await asyncio.wait_for(self._loans(), 1800)
        finally:
            keeping.cancel()
            await asyncio.gather(keeping, return_exceptions=True)
            await self.keeper.stop()

    async def _loans(self) -> None:
        before = await self.answers()
        print(f"asked again at once: {differences(before, await self.answers())}", flush=True)
        assert len({tuple(tokens) for tokens in before}) == len(before), "each is another one"
        for number in range(1, self.options.loans + 1):
            await self.one(number, before)
        if not self.options.cpu:
            await self.one(self.options.loans + 1, before, keeps=True)

    async def one(
        self, number: int, before: Sequence[Sequence[int]], *, keeps: bool = False
    ) -> None:
        """One loan. The process `keeps` the memory until the core has tried to wake up."""
        serving = used_bytes()
        begin_s = time.monotonic()
        loan: Loan = self.keeper.lend()
        sleeps = await asyncio.shield(loan.begun)
        slept_s, asleep = time.monotonic() - begin_s, used_bytes()
        trainer = self.train(1000.0 if keeps else self.options.train_s)
        took = int(await asyncio.to_thread(trainer.stdout.readline) or 0) if trainer.stdout else 0
        training = used_bytes()
        if not keeps:
            assert await asyncio.to_thread(trainer.wait) == 0
        lent_s = time.monotonic() - begin_s
        while not keeps and used_bytes() > asleep + 512 * 1024**2:
            await asyncio.sleep(0.1)
        freed_s, back_s = time.monotonic() - begin_s - lent_s, time.monotonic()
        restarts = self.keeper.restarts
        loan.over.set()
        if keeps:
            await asyncio.sleep(10.0)
            trainer.kill()
            trainer.wait()
        await asyncio.shield(loan.ended)
        woke_s, outage_s = time.monotonic() - back_s, time.monotonic() - begin_s
        after = await self.answers()
        same = after == before
        print(
            f"loan {number}{' that is not given back' if keeps else ''}: "
            f"{'asleep' if sleeps else 'ended'} after {slept_s:.2f} s, "
            f"GPU in use {serving / GIB:.1f} GiB serving, {asleep / GIB:.1f} asleep, "
            f"{training / GIB:.1f} training (which took {took / GIB:.1f}); "
            f"memory back {freed_s:.2f} s after the process's end, "
            f"up again after {woke_s:.2f} s ({self.loaded_s:.2f} s of it {ADAPTERS} adapters), "
            f"{self.keeper.restarts - restarts} restarts; out of service {outage_s:.1f} s; "
            f"{differences(before, after)}; "
            f"{self.keeper.slots_left} client slots left",
            flush=True,
        )
        self.same = self.same and same

    def train(self, seconds: float) -> subprocess.Popen[str]:
        """A process that takes nine tenths of what is free."""
        code = f"import time; print(0, flush=True); time.sleep({seconds})"
        given = ["-c", code] if self.options.cpu else ["-c", TRAINER, "0.9", str(seconds)]
        return subprocess.Popen([sys.executable, *given], stdout=subprocess.PIPE, text=True)

    async def answers(self) -> list[list[int]]:
        """Greedy tokens of base model and adapters, each over all prompts."""
        shard = self.keeper.shard
        if shard is None:
            raise ShardUnavailable("shard-0")
        found = []
        for version in (None, *self.versions):
            tokens: list[int] = []
            for prompt in PROMPTS:
                request = GenerationRequest(
                    request_id=f"r{time.monotonic_ns()}",
                    prompt=prompt,
                    sampling={"max_tokens": TOKENS, "temperature": 0.0, "ignore_eos": True},
                    stream=False,
                )
                rendered = await shard.render(prompt)
                async with contextlib.aclosing(
                    shard.generate(request, rendered, version)
                ) as outputs:
                    async for output in outputs:
                        tokens += (token for delta in output.deltas for token in delta.token_ids)
            found.append(tokens)
        return found


def differences(before: Sequence[Sequence[int]], after: Sequence[Sequence[int]]) -> str:
    """How many tokens of base model and adapters are not what they were, in words."""
    of = [
        sum(a != b for a, b in zip(*pair, strict=True)) for pair in zip(before, after, strict=True)
    ]
    return f"{sum(of)} tokens differ ({', '.join(map(str, of))} of {len(before[0])} of each)"


def used_bytes() -> int:
    """Of the GPU, by all processes; 0 without one."""
    command = ["nvidia-smi", "--id=0", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return 0
    return int(json.loads(answer)) * 1024**2


if __name__ == "__main__":
    main()
