"""Tensors that the base model has no place for, and values that no answer comes of."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from tests.corpus.broken import Kind, spoiled
from tests.corpus.draft import (
    Q_PROJ,
    RANK,
    V_PROJ,
    Draft,
    Spoil,
    a,
    b,
    both,
    configure,
    lacks_tensor,
    moved,
    tensor_has,
    tensor_is,
)

SIDES = {"lora_A": 1, "lora_B": 0}
"""The dimension that is the module's own; the other one is the rank."""


def resized(factor: float, module: str = "") -> Spoil:
    """As for a base model whose layers are `factor` as wide."""

    def spoil(draft: Draft) -> None:
        for name, tensor in draft.tensors.items():
            if module in name:
                shape = list(tensor.shape)
                dimension = next(at for side, at in SIDES.items() if side in name)
                shape[dimension] = int(shape[dimension] * factor)
                draft.tensors[name] = torch.full(shape, 0.01)

    return spoil


def more_heads(draft: Draft) -> None:
    """As for a base model with twice the kv heads: no input is another, but these outputs."""
    for name, tensor in draft.tensors.items():
        if ("k_proj" in name or "v_proj" in name) and "lora_B" in name:
            draft.tensors[name] = torch.cat([tensor, tensor])


def more_layers(draft: Draft) -> None:
    """As for a base model of twice the layers."""
    for name, tensor in list(draft.tensors.items()):
        layer = int(name.split(".layers.")[1].split(".")[0])
        draft.tensors[name.replace(f".layers.{layer}.", f".layers.{layer + 4}.")] = tensor.clone()


def of_rank(rank: int) -> Spoil:
    """All tensors have another rank than the config says."""

    def spoil(draft: Draft) -> None:
        for name, tensor in draft.tensors.items():
            rows, columns = tensor.shape
            shape = (rank, columns) if "lora_A" in name else (rows, rank)
            draft.tensors[name] = torch.full(shape, 0.01)

    return spoil


def renamed(draft: Draft) -> None:
    """The modules of another architecture."""
    draft.tensors = {
        name.replace("model.layers", "transformer.h").replace("self_attn", "attn"): tensor
        for name, tensor in draft.tensors.items()
    }


def megatron(draft: Draft) -> None:
    """Modules as Megatron calls and fuses them, and the fields that go with them."""
    draft.config.update(megatron_config={"hidden_size": 256}, megatron_core="megatron.core")
    module = "decoder.layers.0.self_attention.linear_qkv"
    draft.tensors[a(module)] = torch.full((RANK, 256), 0.01)
    draft.tensors[b(module)] = torch.full((512, RANK), 0.01)


def zeroed(side: str) -> Spoil:
    def spoil(draft: Draft) -> None:
        for name, tensor in draft.tensors.items():
            if side in name:
                tensor.zero_()

    return spoil


def cast(dtype: torch.dtype) -> Spoil:
    def spoil(draft: Draft) -> None:
        draft.tensors = {name: tensor.to(dtype) for name, tensor in draft.tensors.items()}

    return spoil


def cleared(draft: Draft) -> None:
    draft.tensors.clear()


def named(name: str, shape: tuple[int, ...] = (32,)) -> Spoil:
    return tensor_is(f"base_model.model.{name}", torch.ones(shape))


UNKNOWN = "the base model has no such modules"
SHAPES = "tensors have other shapes than the base model"
FOREIGN = "only weights of lora_A and lora_B are served"
TWICE = "there twice, under two names"
DIVERGED = "hold NaN or infinity: the training diverged"
INFINITE = r"become infinite in \w+, which the engine keeps adapters in"
TYPES = "tensors must be of BF16, F16, F32, F64"
NOTHING = "change nothing|answers are the base model"


def shaped(*shape: int) -> Spoil:
    return tensor_is(a(Q_PROJ), torch.ones(shape))


def q_must_be(found: str) -> str:
    return rf"lora_A of {Q_PROJ} is \[{found}\] and must be \[8, 256\]"


NAMES = spoiled(
    Kind.TENSORS,
    {
        "no-tensors": (cleared, "has no LoRA weights"),
        "layer-beyond-last": (moved(V_PROJ, "model.layers.4.self_attn.v_proj"), UNKNOWN),
        "more-layers": (more_layers, rf"{UNKNOWN}.* and 25 more"),
        "other-architecture": (renamed, UNKNOWN),
        "other-case": (moved(V_PROJ, "model.layers.1.self_attn.V_PROJ"), UNKNOWN),
        "fused-attention": (moved(V_PROJ, "transformer.h.0.attn.c_attn"), UNKNOWN),
        "expert": (moved(V_PROJ, "model.layers.1.mlp.experts.0.w1"), UNKNOWN),
        "base-layer": (moved(V_PROJ, V_PROJ + ".base_layer"), UNKNOWN),
        "norm": (moved(V_PROJ, "model.norm"), UNKNOWN),
        "vision-tower": (moved(V_PROJ, "vision_tower.encoder.layers.0.fc1"), UNKNOWN),
        "long-name": (moved(V_PROJ, "x" * 1000), UNKNOWN),
        "path-as-name": (moved(V_PROJ, "../../../../tmp/x"), UNKNOWN),
        "megatron": (megatron, UNKNOWN),
        "score-head": (named("score.weight", (2, 256)), UNKNOWN),
        "empty-name": (tensor_is("", torch.ones(1)), FOREIGN),
        "bare-name": (tensor_is("lora_A", torch.ones(1)), FOREIGN),
        "full-weights": (named("lm_head.weight", (1024, 256)), FOREIGN),
        "dora-magnitude": (named(f"{Q_PROJ}.lora_magnitude_vector"), FOREIGN),
        "lora-b-bias": (named(f"{Q_PROJ}.lora_B.bias"), FOREIGN),
        "loha": (named(f"{Q_PROJ}.hada_w1_a"), FOREIGN),
        "resized-vocabulary": (
            named("model.embed_tokens.base_layer.weight", (1025, 256)),
            "the vocabulary was resized",
        ),
        "twice-with-prefix": (
            tensor_is(f"base_model.model.{a(Q_PROJ)}", torch.ones(8, 256)),
            f"{TWICE}.* lora_A of '{Q_PROJ}'",
        ),
        "twice-without-prefix": (tensor_is(f"{Q_PROJ}.lora_A.weight", torch.ones(8, 256)), TWICE),
        "lora-a-alone": (lacks_tensor(b(V_PROJ)), f"one is missing.* lora_B of {V_PROJ}"),
        "lora-b-alone": (lacks_tensor(a(Q_PROJ)), f"one is missing.* lora_A of {Q_PROJ}"),
    },
)

SIZES = spoiled(
    Kind.TENSORS,
    {
        "smaller-base": (resized(0.5), SHAPES),
        "larger-base": (resized(2), SHAPES),
        "wider-mlp": (resized(2, "gate_proj"), SHAPES),
        "more-kv-heads": (more_heads, r"is \[256, 8\] and must be \[128, 8\]"),
        "rank-lower-in-tensors": (of_rank(4), r"is \[4, 256\] and must be \[8, 256\]"),
        "rank-too-high-in-tensors": (of_rank(64), r"is \[64, 256\] and must be \[8, 256\]"),
        "rank-higher-in-config": (configure(r=16), r"is \[8, 256\] and must be \[16, 256\]"),
        "rank-pattern-differs": (configure(rank_pattern={"v_proj": 4}), r"must be \[4, 256\]"),
        "one-of-lower-rank": (shaped(4, 256), q_must_be("4, 256")),
        "one-narrower": (shaped(8, 128), q_must_be("8, 128")),
        "one-wider": (shaped(8, 512), q_must_be("8, 512")),
        "one-transposed": (shaped(256, 8), q_must_be("256, 8")),
        "one-flat": (shaped(2048), q_must_be("2048")),
        "one-cubic": (shaped(1, 8, 256), q_must_be("1, 8, 256")),
        "one-of-rank-zero": (shaped(0, 256), q_must_be("0, 256")),
        "one-scalar": (shaped(), q_must_be("")),
        "other-output": (
            tensor_is(b(V_PROJ), torch.ones(256, 8)),
            rf"lora_B of {V_PROJ} is \[256, 8\] and must be \[128, 8\]",
        ),
    },
)

RANK_TOO_HIGH = spoiled(
    Kind.TENSORS,
    {"rank-too-high": (both(configure(r=64), of_rank(64)), r"r is 64, and ranks up to \d+")},
    findings=2,
)

VALUES = spoiled(
    Kind.TENSORS,
    {
        "nan-in-a": (tensor_has(a(Q_PROJ), math.nan), f"{DIVERGED}.* lora_A of {Q_PROJ}"),
        "nan-in-b": (tensor_has(b(V_PROJ), math.nan), f"{DIVERGED}.* lora_B of {V_PROJ}"),
        "inf": (tensor_has(b(Q_PROJ), math.inf), f"{DIVERGED}.* lora_B of {Q_PROJ}"),
        "minus-inf": (tensor_has(b(Q_PROJ), -math.inf), f"{DIVERGED}.* lora_B of {Q_PROJ}"),
        "overflow-when-cast": (
            tensor_is(a(Q_PROJ), torch.full((8, 256), 1e300, dtype=torch.float64)),
            INFINITE,
        ),
        "overflow-when-scaled": (configure(lora_alpha=1e300), INFINITE),
        "zero-lora-a": (zeroed("lora_A"), NOTHING),
        "zero-lora-b": (zeroed("lora_B"), NOTHING),
        "zero-alpha": (configure(lora_alpha=0), NOTHING),
    },
)

_TYPES: Mapping[str, torch.dtype] = {
    "int8": torch.int8,
    "int32": torch.int32,
    "bool": torch.bool,
    "fp8-e4m3": torch.float8_e4m3fn,
    "fp8-e5m2": torch.float8_e5m2,
    "complex": torch.complex64,
}

DTYPES = spoiled(
    Kind.TENSORS, {f"dtype-{name}": (cast(dtype), TYPES) for name, dtype in _TYPES.items()}
)

TENSORS = (*NAMES, *SIZES, *RANK_TOO_HIGH, *VALUES, *DTYPES)
