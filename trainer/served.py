"""What the running server serves, as far as training has to know it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class ServedModel:
    """The base model of this gateway."""

    name: str
    """As GetModel tells it."""
    path: Path
    """Its folder: config, weights, tokenizer."""
    fingerprints: Mapping[str, str]
    """By the contract's field names; see `engine.base_model.ModelFingerprints`."""
    dtype: str
    """What the engine computes in, for example `bfloat16`."""
    max_model_len: int
    max_lora_rank: int
    target_modules: tuple[str, ...]
    """Last names of modules that an adapter can be trained on."""
