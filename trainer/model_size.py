"""How large a base model is, read from the headers of its weight files and its config.json."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

from trainer.errors import TrainingUnavailable

HEADER_LENGTH_BYTES = 8
LAYERS = ".layers."
"""In the names of weights that repeat in each layer."""


@dataclass(frozen=True, slots=True)
class ModelSize:
    """Sizes of one model, in numbers and not in bytes."""

    linear: int
    """Weights in the matrices of the layers, which are what is quantized."""
    other: int
    """All other weights: embeddings, head, norms."""
    layers: int
    hidden: int
    intermediate: int
    vocabulary: int
    matrices: tuple[tuple[str, int, int], ...]
    """Of the layers: last name of the module, rows, columns."""

    @property
    def parameters(self) -> int:
        return self.linear + self.other

    def adapter_parameters(self, rank: int, target_modules: Sequence[str]) -> int:
        """Weights of an adapter of this rank on these modules."""
        return sum(
            rank * (rows + columns)
            for name, rows, columns in self.matrices
            if name in target_modules
        )


def model_size(folder: Path) -> ModelSize:
    """Look into a model's folder; reads no weight, and blocks on the disk all the same.

    Raises TrainingUnavailable for a model that cannot be read.
    """
    try:
        config = json.loads((folder / "config.json").read_bytes())
        config = config.get("text_config", config)
        shapes: dict[str, list[int]] = {}
        for path in folder.glob("*.safetensors"):
            shapes |= tensor_shapes(path)
        linear, matrices = 0, []
        for name, shape in shapes.items():
            if LAYERS in name and name.endswith(".weight") and len(shape) == 2:
                linear += prod(shape)
                matrices.append((name.split(".")[-2], shape[0], shape[1]))
        if not matrices:
            raise ValueError("no safetensors with layers")
        hidden = int(config["hidden_size"])
        return ModelSize(
            linear=linear,
            other=sum(prod(shape) for shape in shapes.values()) - linear,
            layers=int(config["num_hidden_layers"]),
            hidden=hidden,
            intermediate=int(config.get("intermediate_size", 4 * hidden)),
            vocabulary=int(config["vocab_size"]),
            matrices=tuple(matrices),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TrainingUnavailable(
            f"the base model cannot be trained on: its files cannot be read ({error!r})"
        ) from error


def tensor_shapes(path: Path) -> dict[str, list[int]]:
    """Of all tensors of a safetensors file, by name. Raises OSError, and ValueError or TypeError
    for another file."""
    with path.open("rb") as file:
        length_bytes = int.from_bytes(file.read(HEADER_LENGTH_BYTES), "little")
        if length_bytes > path.stat().st_size:
            raise ValueError(f"{path.name} is no safetensors file, or damaged")
        header = json.loads(file.read(length_bytes))
    return {name: entry["shape"] for name, entry in header.items() if name != "__metadata__"}
