"""Which adapters a job can train further, and what is said of the others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.trainer.small_adapter import MODULES, tensors_of, write_small_adapter, write_tensors
from trainer.errors import InitFromUnusable, InvalidSpec
from trainer.origin import Origin, read_shape, taken_over
from trainer.spec import AdapterVersionSource, InitFrom, LoraSpec

NAMED = InitFrom(adapter_version=AdapterVersionSource(adapter="pirate", version=3))
HAS = LoraSpec(r=8, alpha=16.0, dropout=0.1, use_rslora=True, target_modules=("q_proj", "v_proj"))


def shape(folder: Path) -> LoraSpec:
    files = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    return read_shape("pirate@3", *files, MODULES)


def test_the_shape_is_what_config_and_tensors_say(tmp_path: Path) -> None:
    assert shape(write_small_adapter(tmp_path)) == HAS
    # Unsloth writes an expression where others write names.
    config: dict[str, Any] = {
        "lora_dropout": None,
        "use_rslora": None,
        "target_modules": ".*_proj",
        "bias": "none",
    }
    found = shape(write_small_adapter(tmp_path / "b", ["up_proj"], 4, **config))
    assert found == LoraSpec(
        r=4, alpha=16.0, dropout=0.0, use_rslora=False, target_modules=("up_proj",)
    )


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"rank_pattern": {"q_proj": 4}}, "for some modules"),
        ({"alpha_pattern": {"q_proj": 4}}, "for some modules"),
        ({"r": 4}, "lora_A and lora_B of q_proj, v_proj"),
        ({"lora_alpha": -16}, "a shape that no job has"),
        ({"lora_alpha": None}, "a shape that no job has"),
        ({"r": None}, "a shape that no job has"),
    ],
)
def test_a_shape_that_no_job_trains_is_refused(
    tmp_path: Path, config: dict[str, Any], said: str
) -> None:
    folder = write_small_adapter(tmp_path, **config)
    with pytest.raises(InitFromUnusable, match=said) as refused:
        shape(folder)
    assert str(refused.value).startswith("pirate@3, which spec.init_from names, ")
    assert "leave spec.init_from unset" in str(refused.value)


@pytest.mark.parametrize(
    "change",
    [
        {"base_model.model.model.layers.0.q_proj.lora_A.weight": None},
        {"base_model.model.model.layers.0.q_proj.lora_A.weight": [8, 3]},
        {"base_model.model.model.layers.1.q_proj.lora_A.weight": [8, 2]},
        {"base_model.model.model.embed_tokens.lora_embedding_A": [8, 2]},
        {"model.layers.0.up_proj.lora_A.weight": [8, 2]},
    ],
)
def test_tensors_that_a_job_would_not_train_are_refused(
    tmp_path: Path, change: dict[str, list[int] | None]
) -> None:
    folder = write_small_adapter(tmp_path)
    tensors = {**tensors_of(["q_proj", "v_proj"], 8), **change}
    there = {name: shape for name, shape in tensors.items() if shape is not None}
    write_tensors(folder / "adapter_model.safetensors", there)
    with pytest.raises(InitFromUnusable, match="does not have the tensors that a job trains"):
        shape(folder)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
@pytest.mark.parametrize(
    ("content", "said"),
    [(None, "is gone"), (b"[1]", "cannot be read"), (b"\xff" * 64, "cannot be read")],
    ids=["gone", "other", "damaged"],
)
def test_files_that_cannot_be_read_are_no_bug_of_ours(
    tmp_path: Path, name: str, content: bytes | None, said: str
) -> None:
    folder = write_small_adapter(tmp_path)
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content)
    with pytest.raises(InitFromUnusable, match=said):
        shape(folder)


def test_what_is_unset_is_taken_over_and_dropout_may_differ() -> None:
    origin = Origin(NAMED, HAS, Path("weights"))
    assert taken_over(LoraSpec(), origin) == HAS
    asked = LoraSpec(
        r=8, alpha=16, use_rslora=True, target_modules=("v_proj", "q_proj"), dropout=0.0
    )
    assert taken_over(asked, origin) == HAS.model_copy(update={"dropout": 0.0})


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"r": 16}, "is 16, and pirate@3, which spec.init_from names, has 8"),
        ({"alpha": 32.0}, "is 32, and pirate@3, which spec.init_from names, has 16"),
        ({"use_rslora": False}, "is false, and pirate@3, which spec.init_from names, has true"),
        ({"target_modules": ("q_proj",)}, "is q_proj, and pirate@3.* has q_proj, v_proj"),
    ],
)
def test_another_shape_is_refused_with_its_field(asked: dict[str, object], said: str) -> None:
    with pytest.raises(InvalidSpec, match=said) as refused:
        taken_over(LoraSpec.model_validate(asked), Origin(NAMED, HAS, Path("weights")))
    [finding] = refused.value.findings
    assert finding.field == f"spec.lora.{next(iter(asked))}"
    assert "leave it unset" in finding.text


def test_all_that_differs_comes_at_once() -> None:
    asked = LoraSpec(r=16, alpha=1.0, use_rslora=False, target_modules=("o_proj",))
    with pytest.raises(InvalidSpec) as refused:
        taken_over(asked, Origin(NAMED, HAS, Path("weights")))
    assert len(refused.value.findings) == 4
