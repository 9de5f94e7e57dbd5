"""What could not be served is told before it is trained, by field and with what to do."""

from __future__ import annotations

from typing import Any

import pytest

from engine.servability import servability_findings, trainable_modules
from tests.engine.drafts import MAX_LORA_RANK, base_llama

GOOD = {
    "peft_type": "LORA",
    "r": 8,
    "lora_alpha": 16.0,
    "lora_dropout": 0.05,
    "use_rslora": True,
    "target_modules": ["q_proj", "down_proj"],
    "bias": "none",
}
LINEAR = base_llama().linear


def findings(**changes: Any) -> list[tuple[str, str]]:
    return servability_findings({**GOOD, **changes}, LINEAR, MAX_LORA_RANK)


def test_what_can_be_served_has_no_findings() -> None:
    assert findings() == []
    assert findings(r=MAX_LORA_RANK, target_modules=list(trainable_modules(LINEAR))) == []
    assert findings(target_modules=["gate_proj", "up_proj"]) == []


def test_the_linear_layers_of_the_base_model_are_named_once_each() -> None:
    assert trainable_modules(LINEAR) == (
        "down_proj",
        "gate_proj",
        "k_proj",
        "o_proj",
        "q_proj",
        "up_proj",
        "v_proj",
    )


@pytest.mark.parametrize(
    ("changes", "field", "says"),
    [
        ({"r": MAX_LORA_RANK + 1}, "r", f"ranks up to {MAX_LORA_RANK} are served"),
        ({"bias": "lora_only"}, "bias", 'train with "none"'),
        ({"lora_alpha": float("inf")}, "lora_alpha", "must be a finite number"),
        ({"use_rslora": "yes"}, "use_rslora", "true or false"),
        ({"target_modules": []}, "target_modules", "must be a list of module names"),
        ({"target_modules": ["q_proj", "lm_head"]}, "target_modules", "choose among down_proj"),
        ({"target_modules": ["proj"]}, "target_modules", "'proj'"),
        # Of which an adapter is served, but not trained.
        ({"target_modules": ["embed_tokens"]}, "target_modules", "no linear layer"),
        ({"target_modules": ["self_attn.q_proj"]}, "target_modules", "must be last names"),
        ({"target_modules": ["a.lm_head"]}, "target_modules", "must be last names"),
        ({"use_dora": True}, "use_dora", "train with use_dora false"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save", "are not served"),
        ({"r": 0}, "r", "whole number from 1"),
    ],
)
def test_pitfalls_what_cannot_be_served_is_told_under_its_field(
    changes: dict[str, Any], field: str, says: str
) -> None:
    ((found, sentence),) = findings(**changes)
    assert found == field
    assert says in sentence


def test_everything_is_told_at_once() -> None:
    found = findings(r=512, bias="all", target_modules=["c_attn"])
    assert {field for field, _ in found} == {"r", "bias", "target_modules"}


def test_what_only_vllm_refuses_is_told_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.lora.peft_helper import PEFTHelper

    def refuse(self: PEFTHelper, limits: object) -> None:
        raise ValueError("vLLM has a new rule.")

    monkeypatch.setattr(PEFTHelper, "validate_legal", refuse)
    ((field, sentence),) = findings()
    assert field == "" and "vLLM has a new rule." in sentence
