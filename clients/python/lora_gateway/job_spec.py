"""What a job is asked for, as keywords."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any, TypedDict

from lora_gateway.v1.training_pb2 import (
    Backend,
    DatasetFormat,
    GateSpec,
    GradientCheckpointing,
    InitFrom,
    JobSpec,
    LearningRateSchedule,
    LossMask,
    Optimizer,
    OverlengthPolicy,
    Precision,
    Quantization,
)


class JobKeywords(TypedDict, total=False):
    """The fields of `JobSpec` and of the messages in it; the contract tells what each means.

    None is the same as leaving a keyword out: the gateway's default applies. A job that is given
    `traffic_percent`, 0 too, or a `gate` publishes; any other keeps its adapter with itself.
    """

    dataset: str | None
    adapter: str | None
    backend: Backend.ValueType | None
    base_model: str | None
    checkpoints_kept: int | None
    cancel_grace_s: float | None
    checkpoint_interval_s: float | None
    max_attempts: int | None
    init_from: InitFrom | None

    epochs: float | None
    max_steps: int | None
    learning_rate: float | None
    learning_rate_schedule: LearningRateSchedule.ValueType | None
    warmup_ratio: float | None
    micro_batch_size: int | None
    gradient_accumulation: int | None
    fit_micro_batch: bool | None
    weight_decay: float | None
    max_grad_norm: float | None
    optimizer: Optimizer.ValueType | None
    seed: int | None
    quantization: Quantization.ValueType | None
    precision: Precision.ValueType | None
    gradient_checkpointing: GradientCheckpointing.ValueType | None

    r: int | None
    alpha: float | None
    dropout: float | None
    use_rslora: bool | None
    target_modules: Sequence[str] | None
    bias: str | None

    format: DatasetFormat.ValueType | None
    max_bad_ratio: float | None
    max_sequence_tokens: int | None
    overlength: OverlengthPolicy.ValueType | None
    max_row_tokens: int | None
    reserve_tokens: int | None
    loss_mask: LossMask.ValueType | None
    eval_fraction: float | None
    eval_dataset: str | None

    traffic_percent: int | None
    gate: GateSpec | None


_DURATIONS = {"cancel_grace_s", "checkpoint_interval_s"}
_SECTIONS = ("hyperparameters", "lora", "data", "publish")


def job_spec(spec: JobSpec | None, keywords: JobKeywords) -> JobSpec:
    """One message from either way of giving a spec.

    Raises:
        TypeError: both ways at once, neither, a keyword that is no field, or a value of another
            type than the field's.
        ValueError: a value out of its type's range, such as a negative `r`.
    """
    given: dict[str, Any] = {name: value for name, value in keywords.items() if value is not None}
    if spec is not None:
        if given:
            raise TypeError(f"give spec=, or {', '.join(given)} as keywords, but not both")
        return spec
    if not given:
        raise TypeError("say what to train: spec=, or dataset= and adapter= as keywords")
    made = JobSpec()
    if isinstance(given.get("target_modules"), str):
        # A lone string would pass for a list of its characters.
        given["target_modules"] = [given["target_modules"]]
    for name in _DURATIONS & given.keys():
        duration = getattr(made, name.removesuffix("_s"))
        duration.FromTimedelta(timedelta(seconds=given.pop(name)))
    fields: dict[str, dict[str, Any]] = {"": {}}
    for name, value in given.items():
        fields.setdefault(_section_of(name), {})[name] = value
    top = fields.pop("")
    sections = {name: _SECTION_TYPES[name](**values) for name, values in fields.items()}
    made.MergeFrom(JobSpec(**top, **sections))
    return made


def _section_of(name: str) -> str:
    """Name of the field of JobSpec whose message has the field `name`; empty: JobSpec itself."""
    for section in _SECTIONS:
        if name in _SECTION_TYPES[section].DESCRIPTOR.fields_by_name:
            return section
    if name in _SECTIONS or name not in JobSpec.DESCRIPTOR.fields_by_name:
        raise TypeError(f"no field of a job's spec: {name}")
    return ""


_SECTION_TYPES: dict[str, Any] = {name: type(getattr(JobSpec(), name)) for name in _SECTIONS}
