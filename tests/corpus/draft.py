"""A draft: an adapter in memory that can be spoiled before it is written."""

from __future__ import annotations

import functools
import json
import struct
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save

from store.artifacts import CONFIG_FILE, WEIGHTS_FILE
from tests.tiny_adapter import write_tiny_adapter

RANK = 8
"""Of the good adapter."""
Q_PROJ = "model.layers.0.self_attn.q_proj"
V_PROJ = "model.layers.1.self_attn.v_proj"
BOMB = "(a+)+$"
"""A regular expression that takes exponential time where nothing is done about it."""


@dataclass
class Draft:
    """What becomes of the two files of an adapter."""

    config: Any
    tensors: dict[str, torch.Tensor]
    config_bytes: bytes | None = None
    """Instead of `config`."""
    weights_bytes: bytes | None = None
    """Instead of `tensors`."""
    without: str = ""
    """Name of the file that is left out."""

    def encoded_config(self) -> bytes:
        """Content of `adapter_config.json`."""
        if self.config_bytes is None:
            return json.dumps(self.config).encode()
        return self.config_bytes

    def encoded_weights(self) -> bytes:
        """Content of `adapter_model.safetensors`."""
        return save(self.tensors) if self.weights_bytes is None else self.weights_bytes

    def write(self, folder: Path) -> None:
        """Write the files into a folder that exists."""
        for name, encode in (
            (CONFIG_FILE, self.encoded_config),
            (WEIGHTS_FILE, self.encoded_weights),
        ):
            if name != self.without:
                (folder / name).write_bytes(encode())


def good_draft(model: Path) -> Draft:
    """An adapter for the Llama in `model` that every check lets through."""
    config, tensors = _good(model)
    copies = {name: tensor.clone() for name, tensor in tensors.items()}
    return Draft(json.loads(config), copies)


@functools.cache
def _good(model: Path) -> tuple[str, dict[str, torch.Tensor]]:
    with tempfile.TemporaryDirectory() as scratch:
        folder = write_tiny_adapter(Path(scratch) / "good", model, seed=11, rank=RANK)
        return (folder / CONFIG_FILE).read_text(), load_file(folder / WEIGHTS_FILE)


def a(module: str) -> str:
    """Name of the module's lora_A, as PEFT writes it."""
    return f"base_model.model.{module}.lora_A.weight"


def b(module: str) -> str:
    """Name of the module's lora_B."""
    return f"base_model.model.{module}.lora_B.weight"


Spoil = Callable[[Draft], object]
"""Breaks an adapter in one way."""


def configure(**changes: Any) -> Spoil:
    """Set fields of the config."""
    return lambda draft: draft.config.update(changes)


def lacks_field(name: str) -> Spoil:
    """Leave a field of the config out."""
    return lambda draft: draft.config.pop(name)


def config_is(content: bytes) -> Spoil:
    """Write these bytes for the config."""
    return lambda draft: setattr(draft, "config_bytes", content)


def weights_are(content: bytes) -> Spoil:
    """Write these bytes for the weights."""
    return lambda draft: setattr(draft, "weights_bytes", content)


def tensor_is(name: str, tensor: torch.Tensor) -> Spoil:
    """Add or replace a tensor."""
    return lambda draft: draft.tensors.update({name: tensor})


def tensor_has(name: str, value: float) -> Spoil:
    """Set the first element of a tensor."""

    def spoil(draft: Draft) -> None:
        draft.tensors[name][0, 0] = value

    return spoil


def lacks_tensor(name: str) -> Spoil:
    """Leave a tensor out."""
    return lambda draft: draft.tensors.pop(name)


def moved(module: str, to: str) -> Spoil:
    """Give a module's tensors to another module."""

    def spoil(draft: Draft) -> None:
        for name in (a, b):
            draft.tensors[name(to)] = draft.tensors.pop(name(module))

    return spoil


def both(*spoils: Spoil) -> Spoil:
    """One after the other."""

    def spoil(draft: Draft) -> None:
        for each in spoils:
            each(draft)

    return spoil


def header(content: bytes, data: bytes = b"") -> bytes:
    """A safetensors file of that header and data, whatever they hold."""
    return struct.pack("<Q", len(content)) + content + data
