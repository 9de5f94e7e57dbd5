"""No adapter that vLLM would choke on, or serve as something else, gets past the check.

The corpus of broken weights is a list: a way to spoil a good adapter, and the finding that
must come of it. An adapter that ever hurt an engine belongs in it, or in that of
`test_adapter_config.py`.
"""

from __future__ import annotations

import json
import math
import struct
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save
from transformers import LlamaForCausalLM

from engine.adapters import MAX_HEADER_BYTES, MAX_TENSORS, AdapterFacts
from engine.errors import AdapterInvalid
from store.artifacts import WEIGHTS_FILE
from tests.engine.drafts import (
    LLAMA,
    Q_PROJ,
    RANK,
    SHAPES,
    V_PROJ,
    Draft,
    Spoil,
    a,
    b,
    check,
    configure,
    findings,
    good_tensors,
    header,
    load_as_vllm_does,
)

WITHOUT_EFFECT = (
    "lora_A or lora_B of every module is zero, so it would change nothing: save the adapter "
    "after it was trained"
)


# --- good adapters


def test_a_good_adapter_passes_with_its_facts(tmp_path: Path) -> None:
    Draft().write(tmp_path)
    assert check(tmp_path) == AdapterFacts(
        rank=RANK,
        target_modules=("q_proj", "v_proj"),
        num_modules=2,
        num_tensors=4,
        num_parameters=2 * RANK * 32 + (32 + 16) * RANK,
        dtype="float32",
    )


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "k_proj"]},
        {"target_modules": "all-linear"},
        {"target_modules": r".*\.layers\.[01]\.(self_attn|mlp)\.(q_proj|down_proj)"},
        {"target_modules": ["q_proj", "v_proj"], "use_rslora": True},
        {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"layers.0.self_attn.q_proj": 4}},
        {"target_modules": ["q_proj"], "alpha_pattern": {"^model.layers.0.self_attn.q_proj": 3}},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["q_proj"], "layers_to_transform": [1]},
        {"target_modules": ["o_proj"], "init_lora_weights": "gaussian"},
    ],
    ids=lambda options: "-".join(options),
)
@pytest.mark.filterwarnings("ignore::UserWarning:peft")
def test_what_peft_writes_passes_and_loads(tmp_path: Path, options: dict[str, Any]) -> None:
    model = get_peft_model(LlamaForCausalLM(LLAMA), LoraConfig(r=RANK, **options))
    assert isinstance(model, PeftModel)
    for name, parameter in model.named_parameters():
        if "lora_" in name:  # one of the two begins as zero
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(str(tmp_path))
    facts = check(tmp_path)
    assert len(load_as_vllm_does(tmp_path).loras) == facts.num_modules
    assert facts.rank <= RANK


@pytest.mark.filterwarnings("ignore::UserWarning:peft")
def test_an_adapter_of_the_output_head_is_refused(tmp_path: Path) -> None:
    config = LoraConfig(r=RANK, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    model = get_peft_model(LlamaForCausalLM(LLAMA), config)
    assert isinstance(model, PeftModel)
    model.save_pretrained(str(tmp_path))
    refused = "the base model has no such modules, or vLLM cannot adapt them"
    assert any(refused in text and "lm_head" in text for text in findings(tmp_path))


def test_ranks_follow_the_rank_pattern(tmp_path: Path) -> None:
    draft = Draft()
    draft.config["rank_pattern"] = {"v_proj": 16}
    draft.tensors[a(V_PROJ)] = torch.ones(16, 32)
    draft.tensors[b(V_PROJ)] = torch.ones(16, 16)
    draft.write(tmp_path)
    assert check(tmp_path).rank == 16


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_floating_type_passes(tmp_path: Path, dtype: torch.dtype) -> None:
    draft = Draft()
    draft.tensors = {name: tensor.to(dtype) for name, tensor in draft.tensors.items()}
    draft.write(tmp_path)
    assert check(tmp_path).dtype == str(dtype).removeprefix("torch.")


def test_types_that_differ_are_mixed(tmp_path: Path) -> None:
    draft = Draft()
    draft.tensors[a(Q_PROJ)] = draft.tensors[a(Q_PROJ)].half()
    draft.write(tmp_path)
    assert check(tmp_path).dtype == "mixed"


@pytest.mark.parametrize("spoil", ["lora_B", "lora_alpha"])
def test_an_adapter_without_effect_is_refused(tmp_path: Path, spoil: str) -> None:
    draft = Draft()
    if spoil == "lora_alpha":
        draft.config["lora_alpha"] = 0
    else:
        for module in SHAPES:
            draft.tensors[b(module)].zero_()
    draft.write(tmp_path)
    assert findings(tmp_path) == (WITHOUT_EFFECT,)


def test_a_copy_of_the_base_embedding_passes(tmp_path: Path) -> None:
    draft = Draft()
    draft.tensors["base_model.model.model.embed_tokens.base_layer.weight"] = torch.ones(96, 32)
    draft.write(tmp_path)
    assert check(tmp_path).num_modules == 2


def test_other_files_in_the_folder_are_no_matter(tmp_path: Path) -> None:
    Draft().write(tmp_path)
    (tmp_path / "adapter_model.bin").write_bytes(b"\x80\x04evil")
    check(tmp_path)


# --- the corpus of broken weights


def weights_are(content: bytes) -> Spoil:
    return lambda draft: setattr(draft, "weights_bytes", content)


def tensor_is(name: str, tensor: torch.Tensor) -> Spoil:
    return lambda draft: draft.tensors.update({name: tensor})


def tensor_has(name: str, value: float) -> Spoil:
    def spoil(draft: Draft) -> None:
        draft.tensors[name][0, 0] = value

    return spoil


def lacks_tensor(name: str) -> Spoil:
    return lambda draft: draft.tensors.pop(name)


def moved(module: str, to: str) -> Spoil:
    def spoil(draft: Draft) -> None:
        for name in (a, b):
            draft.tensors[name(to)] = draft.tensors.pop(name(module))

    return spoil


GOOD_WEIGHTS = save(good_tensors())

CORPUS: list[tuple[Spoil, str]] = [
    (lambda draft: setattr(draft, "without", WEIGHTS_FILE), "model.safetensors is missing"),
    (weights_are(b""), "is damaged or no safetensors file"),
    (weights_are(b"\x02"), "is damaged or no safetensors file"),
    (weights_are(GOOD_WEIGHTS[:-1]), "is damaged or no safetensors file"),
    (weights_are(GOOD_WEIGHTS + b"\0"), "is damaged or no safetensors file"),
    (weights_are(GOOD_WEIGHTS[:100]), "is damaged or no safetensors file"),
    (weights_are(b"\x80\x04K\x01." * 100), "begins with a header of"),
    (weights_are(struct.pack("<Q", 2**63)), f"and the limit is {MAX_HEADER_BYTES}"),
    (weights_are(header(b"[]")), "is damaged or no safetensors file"),
    (weights_are(header(b"\xff" * 8)), "is damaged or no safetensors file"),
    (weights_are(header(b'{"a":' * 10_000)), "is damaged or no safetensors file"),
    (
        weights_are(
            header(
                b'{"x":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,4]}}',
                b"\0\0\0\0",
            )
        ),
        "is damaged or no safetensors file",
    ),
    (weights_are(header(b"{}      ")), "has no LoRA weights"),
    (lambda draft: draft.tensors.clear(), "has no LoRA weights"),
    (
        lambda draft: draft.tensors.update({f"t{n}": torch.zeros(0) for n in range(MAX_TENSORS)}),
        "has 16388 tensors, and the limit is 16384: save the adapter alone",
    ),
    (moved(V_PROJ, "model.layers.2.self_attn.v_proj"), "the base model has no such modules"),
    (moved(V_PROJ, "model.layers.1.self_attn.V_PROJ"), "the base model has no such modules"),
    (moved(V_PROJ, "transformer.h.0.attn.c_attn"), "the base model has no such modules"),
    (moved(V_PROJ, "model.layers.1.mlp.experts.0.w1"), "the base model has no such modules"),
    (moved(V_PROJ, V_PROJ + ".base_layer"), "the base model has no such modules"),
    (moved(V_PROJ, "x" * 1000), "the base model has no such modules"),
    (tensor_is("base_model.model.score.weight", torch.ones(2, 32)), "has no such modules"),
    (tensor_is("", torch.ones(1)), "only weights of lora_A and lora_B are served"),
    (tensor_is("lora_A", torch.ones(1)), "only weights of lora_A and lora_B are served"),
    (
        tensor_is("base_model.model.lm_head.weight", torch.ones(96, 32)),
        "only weights of lora_A and lora_B are served, so what these tensors do would be lost: "
        "train an adapter of LoRA alone: 'base_model.model.lm_head.weight'",
    ),
    (
        tensor_is(f"base_model.model.{Q_PROJ}.lora_magnitude_vector", torch.ones(32)),
        "only weights of lora_A and lora_B are served",
    ),
    (
        tensor_is(f"base_model.model.{Q_PROJ}.lora_B.bias", torch.ones(32)),
        "only weights of lora_A and lora_B are served",
    ),
    (
        tensor_is("base_model.model.model.embed_tokens.base_layer.weight", torch.ones(97, 32)),
        "the vocabulary was resized for training",
    ),
    (
        tensor_is(f"base_model.model.{a(Q_PROJ)}", torch.ones(8, 32)),
        f"there twice, under two names: save the adapter again: lora_A of '{Q_PROJ}'",
    ),
    (tensor_is(f"{Q_PROJ}.lora_A.weight", torch.ones(8, 32)), "there twice, under two names"),
    (lacks_tensor(a(Q_PROJ)), f"and one is missing: save the adapter again: lora_A of {Q_PROJ}"),
    (lacks_tensor(b(V_PROJ)), f"and one is missing: save the adapter again: lora_B of {V_PROJ}"),
    (
        tensor_is(a(Q_PROJ), torch.ones(4, 32)),
        f"lora_A of {Q_PROJ} is [4, 32] and must be [8, 32]",
    ),
    (
        tensor_is(b(V_PROJ), torch.ones(32, 8)),
        f"lora_B of {V_PROJ} is [32, 8] and must be [16, 8]",
    ),
    (tensor_is(a(Q_PROJ), torch.ones(8, 16)), "is [8, 16] and must be [8, 32]"),  # smaller base
    (tensor_is(a(Q_PROJ), torch.ones(8, 64)), "is [8, 64] and must be [8, 32]"),  # larger base
    (tensor_is(a(Q_PROJ), torch.ones(32, 8)), "is [32, 8] and must be [8, 32]"),  # transposed
    (tensor_is(a(Q_PROJ), torch.ones(256)), "is [256] and must be [8, 32]"),
    (tensor_is(a(Q_PROJ), torch.ones(1, 8, 32)), "is [1, 8, 32] and must be [8, 32]"),
    (tensor_is(a(Q_PROJ), torch.ones(0, 32)), "is [0, 32] and must be [8, 32]"),
    (tensor_is(a(Q_PROJ), torch.tensor(1.0)), "is [] and must be [8, 32]"),
    (configure(rank_pattern={"v_proj": 4}), "must be [4, 32]"),
    (configure(r=16), f"lora_A of {Q_PROJ} is [8, 32] and must be [16, 32]"),
    (
        tensor_has(a(Q_PROJ), math.nan),
        f"hold NaN or infinity: the training diverged, train again "
        f"with a lower learning rate: lora_A of {Q_PROJ}",
    ),
    (tensor_has(b(Q_PROJ), math.inf), f"learning rate: lora_B of {Q_PROJ}"),
    (tensor_has(b(Q_PROJ), -math.inf), f"learning rate: lora_B of {Q_PROJ}"),
    (
        tensor_is(a(Q_PROJ), torch.full((8, 32), 1e300, dtype=torch.float64)),
        "become infinite in bfloat16",
    ),
    (configure(lora_alpha=1e300), "become infinite in bfloat16"),
    (tensor_is(a(Q_PROJ), torch.ones(8, 32).int()), "tensors must be of BF16, F16, F32, F64"),
    (tensor_is(a(Q_PROJ), torch.ones(8, 32).bool()), f"lora_A of {Q_PROJ} is 'BOOL'"),
    (
        tensor_is(a(Q_PROJ), torch.ones(8, 32).to(torch.float8_e4m3fn)),
        f"lora_A of {Q_PROJ} is 'F8_E4M3'",
    ),
    (tensor_is(a(Q_PROJ), torch.ones(8, 32).to(torch.complex64)), "is 'C64'"),
]


@pytest.mark.parametrize(("spoil", "expected"), CORPUS, ids=[expected for _, expected in CORPUS])
def test_broken_weights_are_refused_with_their_own_finding_alone(
    tmp_path: Path, spoil: Spoil, expected: str
) -> None:
    draft = Draft()
    spoil(draft)
    draft.write(tmp_path)
    (found,) = findings(tmp_path)
    assert expected in found


# --- how findings come


def test_every_finding_comes_at_once(tmp_path: Path) -> None:
    draft = Draft()
    draft.config.update(r=64, use_dora=True, init_lora_weights="pissa", rank_pattern={"(": 1})
    draft.tensors[a(Q_PROJ)][0, 0] = math.nan
    draft.tensors[b(V_PROJ)] = torch.ones(17, 8)
    draft.tensors[a("model.layers.9.mlp.up_proj")] = torch.ones(8, 32)
    draft.write(tmp_path)
    found = findings(tmp_path)
    for expected in (
        "r is 64",
        "DoRA",
        "init_lora_weights='pissa'",
        "rank_pattern has keys",
        "hold NaN",
        "is [17, 8] and must be [16, r]",
        "'model.layers.9.mlp.up_proj'",
    ):
        assert [expected in finding for finding in found].count(True) == 1, expected
    assert len(found) == 7


def test_a_finding_about_many_tensors_names_three_and_counts_the_others(tmp_path: Path) -> None:
    draft = Draft()
    for layer in range(2, 102):
        draft.tensors[a(f"model.layers.{layer}.mlp.up_proj")] = torch.ones(8, 32)
    draft.write(tmp_path)
    (found,) = findings(tmp_path)
    assert found.endswith(" and 97 more")
    assert len(found) < 500


def test_text_of_the_adapter_cannot_break_the_line(tmp_path: Path) -> None:
    draft = Draft()
    draft.config["peft_type"] = "LORA\r\nINFO all is well \x1b[31m" + "x" * 10_000
    draft.tensors["evil\n\x1b[31m" + "y" * 10_000] = torch.ones(1)
    draft.write(tmp_path)
    for found in findings(tmp_path):
        assert found.isprintable()
        assert len(found) < 400


def test_values_that_only_a_wider_type_holds_pass_where_it_is_used(tmp_path: Path) -> None:
    draft = Draft()
    draft.tensors[a(Q_PROJ)][0, 0] = 1e6  # float16 ends at 65,504
    draft.write(tmp_path)
    check(tmp_path, dtype="bfloat16")
    with pytest.raises(AdapterInvalid, match="become infinite in float16"):
        check(tmp_path, dtype="float16")


def test_a_huge_sparse_tensor_is_refused_by_its_header(tmp_path: Path) -> None:
    rows = 2**26
    description = {"dtype": "F32", "shape": [rows, 32], "data_offsets": [0, rows * 32 * 4]}
    content = header(json.dumps({a(Q_PROJ): description}).encode())
    Draft(weights_bytes=content).write(tmp_path)
    with (tmp_path / WEIGHTS_FILE).open("ab") as file:
        file.truncate(len(content) + rows * 32 * 4)
    begin = time.thread_time()
    found = findings(tmp_path)
    assert time.thread_time() - begin < 1.0
    assert f"is [{rows}, 32] and must be [8, 32]" in " ".join(found)
