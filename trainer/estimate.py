"""What a job would cost: steps, memory, time, money. Pure; an estimate, not a promise."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from trainer.devices import DeviceFacts, usable_bytes
from trainer.effective import HIGH_LEARNING_RATE, HIGH_SCALE, effective_spec
from trainer.footprint import Footprint
from trainer.micro_batch import Shape, fitted, shape_text
from trainer.model_size import ModelSize
from trainer.report import DatasetReport
from trainer.spec import GradientCheckpointing, JobSpec
from trainer.steps import epochs_of, steps_of, training_rows

GPU_FLOPS, CPU_FLOPS = 1.5e14, 5e10
"""What training gets out of a data centre's GPU, and of two cores of a server."""
START_S = 45.0
"""To import the libraries, load a model and save an adapter, until one was measured."""

MIN_WARMED_STEPS = 100
"""Below, a run of so few steps is over before a warm-up would have been."""


@dataclass(frozen=True, slots=True)
class Price:
    """What an hour of a device costs."""

    amount: float
    currency: str


@dataclass(frozen=True, slots=True)
class Pace:
    """How fast earlier runs like it were on this gateway."""

    tokens_per_second: float
    start_s: float
    """Of their time that was not steps."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a job would cost. The contract's `Estimate` has meanings and units."""

    tokens: int
    steps: int
    rows: int
    memory_bytes: int
    memory_available_bytes: int
    duration_s: float
    cost: float | None
    currency: str
    adapter_bytes: int
    lora_scale: float
    measured: bool
    warnings: tuple[str, ...]


def estimate(
    spec: JobSpec,
    report: DatasetReport,
    size: ModelSize,
    facts: DeviceFacts,
    *,
    on_gpu: bool,
    served_width_bytes: int,
    max_model_len: int,
    max_lora_rank: int,
    pace: Pace | None,
    price: Price | None,
) -> Estimate:
    """Of a resolved spec; `report` is its dataset's, and `served_width_bytes` a saved weight's.

    Where the trainer is to fit rows into memory, memory and time are of what it would choose.
    """
    spec, _ = effective_spec(spec, on_gpu=on_gpu, bfloat16=facts.bfloat16)
    rows = training_rows(spec, report.rows)
    steps, epochs = steps_of(spec, rows), epochs_of(spec, rows)
    tokens = round(report.tokens.total * (rows / report.rows if report.rows else 0) * epochs)
    assert spec.lora.r is not None
    adapter = size.adapter_parameters(spec.lora.r, spec.lora.target_modules)
    footprint = Footprint(spec, size, report.tokens.max, on_gpu)
    shape, assumed = _shape(spec, footprint, facts)
    if pace is None:
        checkpointed = shape.checkpointing is not GradientCheckpointing.OFF
        # Forward 2, backward 2 (frozen weights have no gradient), and forward once more.
        operations = (6 if checkpointed else 4) * size.parameters
        pace = Pace((GPU_FLOPS if on_gpu else CPU_FLOPS) / operations, START_S)
        measured = False
    else:
        measured = True
    duration_s = pace.start_s + tokens / pace.tokens_per_second
    return Estimate(
        tokens=tokens,
        steps=steps,
        rows=rows,
        memory_bytes=footprint.total_bytes(shape),
        memory_available_bytes=facts.memory_available_bytes,
        duration_s=duration_s,
        cost=None if price is None else price.amount * duration_s / 3600,
        currency="" if price is None else price.currency,
        adapter_bytes=adapter * served_width_bytes,
        lora_scale=spec.lora.scale,
        measured=measured,
        warnings=(
            *_warnings(spec, report, steps, max_model_len, max_lora_rank),
            *assumed,
        ),
    )


def _shape(spec: JobSpec, footprint: Footprint, facts: DeviceFacts) -> tuple[Shape, Sequence[str]]:
    """What a step is computed in, and what is to be known of that."""
    asked = spec.hyperparameters
    assert asked.micro_batch_size and asked.gradient_checkpointing
    usable = usable_bytes(facts, on_gpu=footprint.on_gpu)
    if not (asked.fit_micro_batch and usable):
        as_asked = Shape(asked.micro_batch_size, asked.gradient_checkpointing)
        needed, available = footprint.total_bytes(as_asked), facts.memory_available_bytes
        if needed <= available:
            return as_asked, ()
        return as_asked, [
            f"it needs about {needed / 1e9:.1f} GB and the device has {available / 1e9:.1f} GB "
            "free: reduce micro_batch_size or max_sequence_tokens"
        ]
    shape = footprint.fitted(usable)
    if shape is None:
        smallest = Shape(1, asked.gradient_checkpointing)
        return smallest, [
            f"one row at once needs about {footprint.total_bytes(smallest) / 1e9:.1f} GB and a run "
            f"may take {usable / 1e9:.1f} GB: reduce max_sequence_tokens or r"
        ]
    _, changes = fitted(asked, shape)
    if not changes:
        return shape, ()
    return shape, [
        f"memory and time are of {shape_text(asked, shape)}: the trainer tries what fits the "
        "device (fit_micro_batch), and is likely to find that"
    ]


def _warnings(
    spec: JobSpec,
    report: DatasetReport,
    steps: int,
    max_model_len: int,
    max_lora_rank: int,
) -> Iterator[str]:
    asked, lora, data = spec.hyperparameters, spec.lora, spec.data
    assert asked.learning_rate is not None and lora.r is not None and data.max_sequence_tokens
    if lora.use_rslora and lora.scale > HIGH_SCALE and asked.learning_rate >= HIGH_LEARNING_RATE:
        yield (
            f"rsLoRA multiplies the adapter by alpha / sqrt(r) = {lora.scale:.1f}, not by "
            f"alpha / r = {(lora.alpha or 0) / lora.r:g}, at a learning rate of "
            f"{asked.learning_rate:g}: if the loss rises, lower the learning rate or alpha"
        )
    if 2 * lora.r > max_lora_rank and lora.r < max_lora_rank:
        yield f"rank {lora.r} is near {max_lora_rank}, the highest that is served"
    if not asked.warmup_ratio and steps < MIN_WARMED_STEPS:
        yield (
            f"all {steps} steps begin at the full learning rate: with so few, a warmup_ratio of "
            "0.1 trains more steadily"
        )
    if report.overlength_rows:
        yield (
            f"{report.overlength_rows} rows are too long and left out: raise max_row_tokens, or "
            "take overlength truncate_turns"
        )
    if report.truncated_rows:
        yield f"{report.truncated_rows} rows lose their oldest turns to fit"
    if data.max_sequence_tokens < max_model_len:
        yield (
            f"rows have at most {data.max_sequence_tokens} tokens, and the server takes "
            f"{max_model_len}: longer prompts are not what it was trained for"
        )


def pace_of(runs: Sequence[tuple[int, float, float]]) -> Pace | None:
    """The pace of earlier runs: tokens, seconds of their steps, seconds of the rest of each.

    None without a run that took any time.
    """
    steps_s = sum(steps for _, steps, _ in runs)
    tokens = sum(tokens for tokens, _, _ in runs)
    if not steps_s or not tokens:
        return None
    return Pace(tokens / steps_s, sum(rest for _, _, rest in runs) / len(runs))
