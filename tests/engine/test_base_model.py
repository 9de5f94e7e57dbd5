"""What a model folder says about the model in it."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen3MoeConfig

from engine.base_model import base_modules, fingerprints
from engine.errors import ModelNotFound

TINY: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128}
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}


def write_config(folder: Path, **changes: Any) -> Path:
    config = LlamaConfig(**TINY, architectures=["LlamaForCausalLM"]).to_dict() | changes
    (folder / "config.json").write_text(json.dumps(config))
    return folder


# --- shapes


def test_every_linear_layer_of_the_decoder_has_its_shape(tmp_path: Path) -> None:
    linear = base_modules(write_config(tmp_path)).linear
    assert {name: shape for name, shape in linear.items() if ".layers.1." in name} == {
        "model.layers.1.self_attn.q_proj": (32, 32),
        "model.layers.1.self_attn.k_proj": (16, 32),
        "model.layers.1.self_attn.v_proj": (16, 32),
        "model.layers.1.self_attn.o_proj": (32, 32),
        "model.layers.1.mlp.gate_proj": (48, 32),
        "model.layers.1.mlp.up_proj": (48, 32),
        "model.layers.1.mlp.down_proj": (32, 48),
    }
    assert len(linear) == 2 * 7


@pytest.mark.parametrize("tied", [False, True])
def test_embeddings_are_there_if_vllm_adapts_them_and_the_head_never_is(
    tmp_path: Path, tied: bool
) -> None:
    modules = base_modules(write_config(tmp_path, tie_word_embeddings=tied))
    assert modules.embeddings == {"model.embed_tokens": (32, 96)}
    assert modules.shapes == {**modules.linear, **modules.embeddings}
    assert "lm_head" not in modules.shapes


def test_embeddings_are_not_there_if_vllm_does_not_adapt_them(tmp_path: Path) -> None:
    config = Qwen2Config(**TINY, architectures=["Qwen2ForCausalLM"])
    config.save_pretrained(tmp_path)
    assert {name.split(".")[1] for name in base_modules(tmp_path).shapes} == {"layers"}


def test_fused_experts_are_no_linear_layers(tmp_path: Path) -> None:
    config = Qwen3MoeConfig(**TINY, num_experts=4, architectures=["Qwen3MoeForCausalLM"])
    config.save_pretrained(tmp_path)
    assert not [name for name in base_modules(tmp_path).shapes if "experts" in name]


@pytest.mark.parametrize("quantization", [BNB, GPTQ, FP8], ids=["bitsandbytes", "gptq", "fp8"])
def test_a_quantized_checkpoint_has_the_shapes_of_the_model_it_stands_for(
    tmp_path: Path, quantization: dict[str, Any]
) -> None:
    expected = base_modules(write_config(tmp_path))
    assert base_modules(write_config(tmp_path, quantization_config=quantization)) == expected


def test_a_large_model_needs_neither_weights_nor_memory(tmp_path: Path) -> None:
    large = {"hidden_size": 8192, "intermediate_size": 28_672, "num_hidden_layers": 80}
    modules = base_modules(write_config(tmp_path, **large, num_attention_heads=64))
    assert modules.linear["model.layers.79.mlp.up_proj"] == (28_672, 8192)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "no-such"}, "model type `no-such`"),
        ({"model_type": "x", "auto_map": {"AutoConfig": "code.X"}}, "contains custom code"),
        ([], "is no model that transformers can build"),
        ({"model_type": "llama", "hidden_size": "many"}, "'hidden_size'"),
    ],
)
def test_a_config_that_cannot_be_built_is_no_model(
    tmp_path: Path, config: object, message: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelNotFound, match=message) as caught:
        base_modules(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_folder_without_a_config_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound):
        base_modules(tmp_path)
    with pytest.raises(ModelNotFound):
        fingerprints(tmp_path)


# --- fingerprints


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A whole model folder: weights, tokenizer files, chat template."""
    LlamaForCausalLM(LlamaConfig(**TINY)).save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}')
    return tmp_path


def test_each_fingerprint_is_a_sha256(model: Path) -> None:
    prints = fingerprints(model)
    for fingerprint in (
        prints.config_sha256,
        prints.weights_sha256,
        prints.tokenizer_sha256,
        prints.chat_template_sha256,
    ):
        assert len(fingerprint) == 64
        assert set(fingerprint) <= set("0123456789abcdef")


def test_what_is_not_there_has_an_empty_fingerprint(tmp_path: Path) -> None:
    prints = fingerprints(write_config(tmp_path))
    assert prints.config_sha256
    assert prints.weights_sha256 == prints.tokenizer_sha256 == prints.chat_template_sha256 == ""


def touch_config(model: Path) -> None:
    with (model / "config.json").open("a") as file:
        file.write("\n")


def touch_weights(model: Path) -> None:
    save_file({"other": torch.zeros(1)}, model / "model.safetensors")


def touch_tokenizer(model: Path) -> None:
    (model / "tokenizer.json").write_text('{"added_tokens": []}')


def touch_template(model: Path) -> None:
    (model / "chat_template.jinja").write_text("{{ other }}")


@pytest.mark.parametrize(
    ("touch", "changed"),
    [
        (touch_config, "config_sha256"),
        (touch_weights, "weights_sha256"),
        (touch_tokenizer, "tokenizer_sha256"),
        (touch_template, "chat_template_sha256"),
    ],
)
def test_a_change_shows_in_its_own_fingerprint_alone(
    model: Path, touch: Callable[[Path], None], changed: str
) -> None:
    before = fingerprints(model)
    touch(model)
    after = fingerprints(model)
    assert [name for name in before.__slots__ if getattr(before, name) != getattr(after, name)] == [
        changed
    ]


def test_weights_are_told_apart_by_shape_and_dtype_but_not_by_values(tmp_path: Path) -> None:
    def fingerprint(tensor: torch.Tensor) -> str:
        save_file({"weight": tensor}, tmp_path / "model.safetensors", metadata={"any": "thing"})
        return fingerprints(tmp_path).weights_sha256

    write_config(tmp_path)
    zeros = fingerprint(torch.zeros(2, 3))
    assert fingerprint(torch.ones(2, 3)) == zeros
    assert fingerprint(torch.zeros(3, 2)) != zeros
    assert fingerprint(torch.zeros(2, 3, dtype=torch.bfloat16)) != zeros


def test_sharded_weights_have_the_fingerprint_of_the_whole(tmp_path: Path) -> None:
    a, b = torch.zeros(2), torch.zeros(3)
    write_config(tmp_path)
    save_file({"a": a, "b": b}, tmp_path / "model.safetensors")
    whole = fingerprints(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    save_file({"a": a}, tmp_path / "model-1.safetensors")
    save_file({"b": b}, tmp_path / "model-2.safetensors")
    save_file({"c": b}, tmp_path / "consolidated.safetensors")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert fingerprints(tmp_path) == whole


def test_the_template_is_the_same_wherever_it_stands(model: Path) -> None:
    inside = fingerprints(model).chat_template_sha256
    named = [{"name": "default", "template": "{{ messages }}"}, {"name": "rag", "template": "x"}]
    (model / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert fingerprints(model).chat_template_sha256 == inside
    (model / "tokenizer_config.json").write_text("{}")
    (model / "chat_template.jinja").write_text("{{ messages }}")
    assert fingerprints(model).chat_template_sha256 == inside


@pytest.mark.parametrize(
    "content",
    [b"", b"\0" * 7, struct.pack("<Q", 2**63), struct.pack("<Q", 4) + b"null", b"\x02" + b"\0" * 7],
)
def test_damaged_weights_are_no_model(model: Path, content: bytes) -> None:
    (model / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelNotFound, match="cannot be read as a model folder"):
        fingerprints(model)
