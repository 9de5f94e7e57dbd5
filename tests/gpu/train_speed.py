"""Measures training on one GPU: plain PEFT against the service's training process.

    PYTHONPATH=. python tests/gpu/train_speed.py [--tiny]    Llama-3.1-8B's shape; or on a CPU

Needs no network: weights are random, which is right for speed and memory, and wrong for quality.
Rows, masks, order, effective batch and steps are the same for all parts:

    model      random weights and full-length rows, made once in --folder
    plain-2    transformers and PEFT as their guides have it: 2 rows at once, 4 times a step
    plain-4, -8  the same with more rows at once, for PEFT's own best
    equal      the training process, Unsloth, in the same shape
    fitted     the training process, Unsloth, that finds its own shape
    peft       the training process, PEFT, that finds its own shape

Results are printed as they come, and kept in --folder, so parts may be run one by one (--parts).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.environment import training_environment
from trainer.events import WorkerEvent, WorkerEventKind
from trainer.run_folder import RunExit, RunFolder, RunPlan, write_whole
from trainer.spec import Backend, JobSpec

PARTS = ("model", "plain-2", "plain-4", "plain-8", "equal", "fitted", "peft")
ROOT = Path(__file__).parents[2]
ROWS_A_STEP = 8
GIB = 1024**3
MUST_BE_FASTER, MUST_BE_SMALLER = 2.2, 0.5


@dataclass(frozen=True, slots=True)
class Scale:
    """How much is measured."""

    tiny: bool
    tokens: int
    """In each row."""
    steps: int
    skipped: int
    """Of the steps: they compile and warm up."""
    more_steps: int
    """For each larger micro-batch of plain PEFT."""

    @property
    def device(self) -> str:
        return "cpu" if self.tiny else "0"


def main() -> None:
    """Run the parts, each in a process of its own, and print how they compare."""
    parser = argparse.ArgumentParser(description="Measure training on one GPU.")
    parser.add_argument("--tiny", action="store_true", help="a small model on the CPU")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/train-speed"))
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--in-process", help=argparse.SUPPRESS)
    options = parser.parse_args()
    scale = (
        Scale(tiny=True, tokens=64, steps=6, skipped=2, more_steps=3)
        if options.tiny
        else Scale(tiny=False, tokens=2048, steps=options.steps, skipped=6, more_steps=5)
    )
    folder: Path = options.folder
    folder.mkdir(parents=True, exist_ok=True)
    if options.in_process:
        part, _, micro_batch = options.in_process.partition("-")
        if part == "model":
            make_model(folder, scale)
        else:
            train_plain(folder, scale, int(micro_batch))
        return
    for part in options.parts.split(","):
        began_s = time.monotonic()
        if part.startswith(("model", "plain")):
            run_self(part, options)
        else:
            backend = Backend.PEFT if part == "peft" else Backend.UNSLOTH
            train_by_worker(folder, scale, part, backend, fit=part != "equal")
        say(f"part {part}: {time.monotonic() - began_s:.0f} s")
    compare(folder)


def say(text: str) -> None:
    print(text, flush=True)


def run_self(part: str, options: argparse.Namespace) -> None:
    """In another process, which leaves no memory behind."""
    command = [sys.executable, __file__, "--in-process", part, "--folder", str(options.folder)]
    command += ["--steps", str(options.steps)] + (["--tiny"] if options.tiny else [])
    device = "cpu" if options.tiny else "0"
    run = RunFolder(options.folder)
    subprocess.run(command, check=True, env=environment_of(run, device))


def environment_of(run: RunFolder, device: str) -> dict[str, str]:
    """What a training process gets, and where it finds our packages."""
    environment = training_environment(os.environ, run, device)
    others = environment.get("PYTHONPATH", "").split(os.pathsep)
    return {**environment, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, others)])}


def make_model(folder: Path, scale: Scale) -> None:
    """A Llama with random weights and a tokenizer without meaning, and rows of full length."""
    from tests.gpu.random_llama import write_model, write_rows

    write_model(folder / "model", tiny=scale.tiny)
    write_rows(folder / "rows", count=ROWS_A_STEP * scale.steps, tokens=scale.tokens)


def spec_of(scale: Scale, backend: Backend, *, fit: bool) -> JobSpec:
    """The recipe's defaults, over one epoch."""
    asked: dict[str, Any] = {"epochs": 1.0, "fit_micro_batch": fit}
    if scale.tiny:  # as on a GPU, as far as a CPU has it
        asked["gradient_checkpointing"] = "unsloth"
    fields = {
        "dataset": "rows",
        "adapter": "speed",
        "hyperparameters": asked,
        "data": {"max_sequence_tokens": scale.tokens, "eval_fraction": 0.0},
        "checkpoints_kept": 1,
    }
    return JobSpec.model_validate(fields).resolved(
        base_model="random",
        max_model_len=scale.tokens,
        served_dtype="bfloat16",
        backend=backend,
        on_gpu=not scale.tiny,
    )


def train_plain(folder: Path, scale: Scale, micro_batch: int) -> None:
    """Without the service: 4 bits, gradient checkpointing, and what PEFT says prepares a model."""
    import torch
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TrainerCallback

    from trainer.backends.quantization import keep_trainable_on_cpu
    from trainer.batches import Collator, load_rows
    from trainer.effective import effective_spec
    from trainer.memory import memory_of
    from trainer.training_loop import RecipeTrainer, training_arguments

    on_gpu = not scale.tiny
    memory = memory_of(on_gpu=on_gpu, limit_bytes=0)
    spec, _ = effective_spec(spec_of(scale, Backend.PEFT, fit=False), on_gpu=on_gpu, bfloat16=True)
    model = AutoModelForCausalLM.from_pretrained(
        folder / "model",
        dtype=torch.bfloat16,
        device_map={"": 0 if on_gpu else "cpu"},
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        ),
    )
    model = prepare_model_for_kbit_training(
        model, gradient_checkpointing_kwargs={"use_reentrant": False}
    )
    torch.manual_seed(spec.hyperparameters.seed)
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=32,
        lora_alpha=64,
        lora_dropout=0.05,
        use_rslora=True,
        target_modules=list(spec.lora.target_modules),
    )
    model = get_peft_model(model, lora)
    keep_trainable_on_cpu(model)
    rows = load_rows(
        folder / "rows", None, eval_fraction=0.0, seed=1, cache=folder / "plain-rows"
    ).train

    class Times(TrainerCallback):  # type: ignore[misc]
        """When each step ended, and its loss."""

        def __init__(self) -> None:
            self.ended_s: list[float] = []
            self.losses: list[float] = []

        def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
            if "loss" in logs:
                self.ended_s.append(time.monotonic())
                self.losses.append(logs["loss"])

    first = micro_batch == 2
    shape = {
        "micro_batch_size": micro_batch,
        "gradient_accumulation": ROWS_A_STEP // micro_batch,
    }
    hyperparameters = spec.hyperparameters.model_copy(update=shape)
    arguments = training_arguments(
        spec.model_copy(update={"hyperparameters": hyperparameters}),
        folder / "plain",
        steps=scale.steps if first else scale.more_steps,
        evaluates=False,
        on_gpu=on_gpu,
    )
    arguments.save_strategy = "no"
    collator, times = Collator(folder / "model"), Times()
    trainer = RecipeTrainer(model, arguments, collator, rows, None, collator, lambda: False)
    trainer.add_callback(times)
    try:
        trainer.train()
    except torch.OutOfMemoryError:
        say(f"plain PEFT {micro_batch} rows at once: out of memory")
        return
    keep(
        folder,
        f"plain-{micro_batch}",
        times.ended_s,
        times.losses,
        memory.peak_bytes(),
        scale,
        skipped=scale.skipped if first else 2,
        shape=f"{micro_batch}x{ROWS_A_STEP // micro_batch}",
    )


def train_by_worker(folder: Path, scale: Scale, part: str, backend: Backend, *, fit: bool) -> None:
    """By the service's own training process, as its host starts it."""
    run = RunFolder(folder / f"run-{part}-{time.time_ns()}")
    run.path.mkdir()
    plan = RunPlan(
        tenant="t",
        job=part,
        uid=part,
        attempt=1,
        spec=spec_of(scale, backend, fit=fit),
        model_path=str(folder / "model"),
        served_dtype="bfloat16",
        fingerprints={},
        device=scale.device,
        dataset_sha256="",
        rows=str(folder / "rows"),
        memory_bytes=8 * GIB if scale.tiny else 0,
    )
    write_whole(run.plan, plan)
    with run.log.open("wb") as log:
        code = subprocess.run(
            [sys.executable, "-m", "trainer.worker", str(run.path)],
            cwd=run.path,
            env=environment_of(run, scale.device),
            stdout=log,
            stderr=subprocess.STDOUT,
        ).returncode
    tail = run.log.read_text(errors="replace").splitlines()[-40:]
    if code or not RunExit.model_validate_json(run.exit.read_bytes()).ok:
        say("\n".join([*tail, f"part {part} failed with {code}"]))
        return
    events = [WorkerEvent.model_validate_json(line) for line in run.events.open()]
    for event in events:
        if event.kind is WorkerEventKind.NOTICE:
            say(f"  notice: {event.payload['message']}")
    [effective] = [e.payload for e in events if e.kind is WorkerEventKind.LOADED]
    steps: list[WorkerEvent] = [e for e in events if e.kind is WorkerEventKind.PROGRESS]
    asked: Any = effective["hyperparameters"]
    losses: Any = [step.payload["loss"] for step in steps]
    peaks: Any = [step.payload["memory_peak_bytes"] for step in steps]
    keep(
        folder,
        part,
        [step.time_ns / 1e9 for step in steps],
        losses,
        max(peaks),
        scale,
        skipped=scale.skipped,
        shape=f"{asked['micro_batch_size']}x{asked['gradient_accumulation']}, checkpointing "
        f"{asked['gradient_checkpointing']}",
    )
    say("\n".join(f"  log: {line}" for line in tail if "rows at once" in line))


def keep(
    folder: Path,
    part: str,
    ended_s: list[float],
    losses: list[float],
    peak_bytes: int,
    scale: Scale,
    *,
    skipped: int,
    shape: str,
) -> None:
    """Print one result, and write it down for the comparison."""
    times = [b - a for a, b in zip(ended_s[skipped - 1 :], ended_s[skipped:], strict=False)]
    tokens = ROWS_A_STEP * scale.tokens
    result = {
        "tokens_per_second": tokens / statistics.median(times),
        "mean_tokens_per_second": tokens * len(times) / sum(times),
        "peak_gib": peak_bytes / GIB,
        "shape": shape,
        "losses": losses,
    }
    (folder / f"result-{part}.json").write_text(json.dumps(result))
    say(
        f"{part} ({shape}): {result['tokens_per_second']:,.0f} tokens/s (mean "
        f"{result['mean_tokens_per_second']:,.0f}), peak {result['peak_gib']:.2f} GiB, "
        f"{len(times)} steps, loss {losses[0]:.4f} -> {losses[-1]:.4f}"
    )


def compare(folder: Path) -> None:
    """Print the quotients that are asked for, of whatever was measured."""
    results = {
        path.stem.removeprefix("result-"): json.loads(path.read_text())
        for path in sorted(folder.glob("result-*.json"))
    }
    if "plain-2" not in results:
        return
    plain = results["plain-2"]
    best = max(
        (name for name in results if name.startswith("plain-")),
        key=lambda name: results[name]["tokens_per_second"],
    )
    for part in ("equal", "fitted", "peft"):
        if part not in results:
            continue
        found = results[part]
        speed = found["tokens_per_second"] / plain["tokens_per_second"]
        against_best = found["tokens_per_second"] / results[best]["tokens_per_second"]
        memory = found["peak_gib"] / plain["peak_gib"]
        apart = max(abs(a - b) for a, b in zip(found["losses"], plain["losses"], strict=False))
        say(
            f"{part}: {speed:.2f}x plain PEFT 2x4, {against_best:.2f}x its best "
            f"({results[best]['shape']}), {memory:.0%} of the memory, losses at most {apart:.4f} "
            "apart"
        )
    if "fitted" in results and "equal" in results:
        speed = results["fitted"]["tokens_per_second"] / plain["tokens_per_second"]
        memory = results["equal"]["peak_gib"] / plain["peak_gib"]
        say(f"speed {speed:.2f}x, at least {MUST_BE_FASTER}: {verdict(speed >= MUST_BE_FASTER)}")
        say(f"memory {memory:.0%}, at most 50 %: {verdict(memory <= MUST_BE_SMALLER)}")


def verdict(reached: bool) -> str:
    return "reached" if reached else "NOT REACHED"


if __name__ == "__main__":
    main()
