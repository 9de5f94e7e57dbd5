"""What a shard serves."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What a shard serves, for GetModel."""

    dtype: str
    quantization: str
    architecture: str
    vocab_size: int
    max_model_len: int
    chat_template: str
    engine_version: str
