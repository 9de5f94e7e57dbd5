"""The adapter that a job begins with, and whether a job can train one of its shape. Pure, but for
the two files of it.

A job trains the same ranks and scale for a module in every layer, which other trainers do not
have to. What differs would be lost, or trained as something else.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from trainer.errors import InitFromUnusable, InvalidSpec
from trainer.model_size import tensor_shapes
from trainer.publisher import Finding
from trainer.spec import InitFrom, LoraSpec

FIXED = ("r", "alpha", "use_rslora", "target_modules")
"""Of `LoraSpec`: another value would make another adapter of the same weights."""
ADVICE = "leave spec.init_from unset to train a new adapter, or name another one"
_TENSOR = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
"""As PEFT saves an adapter of linear layers."""


@dataclass(frozen=True, slots=True)
class Origin:
    """What was found."""

    init_from: InitFrom
    """With every field set."""
    lora: LoraSpec
    """With every field set."""
    weights: Path


def read_shape(
    name: str, config: Path, weights: Path, modules: Mapping[str, tuple[int, int]]
) -> LoraSpec:
    """The shape of an adapter, which is called `name`, with every field set. Reads no weight.

    Raises InitFromUnusable, unless it is one that a job on a base model with these linear layers
    trains.
    """
    try:
        told: dict[str, Any] = dict(json.loads(config.read_bytes()))
        tensors = tensor_shapes(weights)
    except FileNotFoundError as error:
        raise InitFromUnusable(name, f"is gone: {ADVICE}") from error
    except (OSError, ValueError, TypeError) as error:
        raise InitFromUnusable(name, f"has files that cannot be read: {ADVICE}") from error
    if told.get("rank_pattern") or told.get("alpha_pattern"):
        raise InitFromUnusable(
            name,
            "has ranks or scales of their own for some modules (rank_pattern, alpha_pattern), and "
            f"a job trains all with the same: {ADVICE}",
        )
    found = [_TENSOR.fullmatch(tensor) for tensor in tensors]
    targets = {match[1].rpartition(".")[2] for match in found if match is not None}
    lora = _lora(told, targets)
    if lora is None or lora.r is None or lora.alpha is None:
        raise InitFromUnusable(name, f"has a shape that no job has: {ADVICE}")
    if tensors != _tensors(lora.r, targets, modules):
        raise InitFromUnusable(
            name,
            "does not have the tensors that a job trains, which are lora_A and lora_B of "
            f"{', '.join(sorted(targets)) or 'linear layers'} in every layer of the base model: "
            f"{ADVICE}",
        )
    return lora


def _lora(told: Mapping[str, Any], targets: set[str]) -> LoraSpec | None:
    """What a config says; None: no job may say so."""
    try:
        return LoraSpec(
            r=told.get("r"),
            alpha=told.get("lora_alpha"),
            dropout=told.get("lora_dropout") or 0.0,
            use_rslora=bool(told.get("use_rslora")),
            target_modules=tuple(sorted(targets)),
        )
    except ValidationError:
        return None


def _tensors(
    rank: int, targets: set[str], modules: Mapping[str, tuple[int, int]]
) -> dict[str, list[int]]:
    """What PEFT saves of an adapter of these modules."""
    tensors = {}
    for module, (rows, columns) in modules.items():
        if module.rpartition(".")[2] in targets:
            tensors[f"base_model.model.{module}.lora_A.weight"] = [rank, columns]
            tensors[f"base_model.model.{module}.lora_B.weight"] = [rows, rank]
    return tensors


def taken_over(asked: LoraSpec, origin: Origin) -> LoraSpec:
    """The shape of an adapter that begins with that one. Raises InvalidSpec where another one
    was asked for."""
    wrong = [
        Finding(
            f"spec.lora.{field}",
            f"is {_shown(wanted)}, and {origin.init_from.text}, which spec.init_from names, has "
            f"{_shown(there)}: leave it unset, or train a new adapter, without spec.init_from",
        )
        for field in FIXED
        if _asked_for(wanted := getattr(asked, field))
        and _comparable(wanted) != _comparable(there := getattr(origin.lora, field))
    ]
    if wrong:
        raise InvalidSpec(*wrong)
    dropout = origin.lora.dropout if asked.dropout is None else asked.dropout
    return origin.lora.model_copy(update={"dropout": dropout, "bias": asked.bias})


def _asked_for(value: object) -> bool:
    return value is not None and value != ()


def _comparable(value: object) -> object:
    return frozenset(value) if isinstance(value, Sequence) else value


def _shown(value: object) -> str:
    match value:
        case bool():
            return str(value).lower()
        case float():
            return f"{value:g}"
        case tuple():
            return ", ".join(value)
        case _:
            return str(value)
