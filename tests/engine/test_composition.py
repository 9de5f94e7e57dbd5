"""Two adapters that PEFT made one of, as docs/adapters.md shows it, are served as any other."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM

from tests.engine.drafts import LLAMA, MAX_LORA_RANK, check, findings, load_as_vllm_does

PAGE = (Path(__file__).parents[2] / "docs" / "adapters.md").read_text()
RANK = MAX_LORA_RANK // 2

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")


def train(folder: Path, rank: int, *, rslora: bool) -> dict[str, torch.Tensor]:
    """An adapter that changes something; returns by what it changes the weight of each module."""
    config = LoraConfig(
        r=rank,
        lora_alpha=16,
        use_rslora=rslora,
        target_modules=["q_proj", "v_proj"],
        init_lora_weights=False,
    )
    model: Any = get_peft_model(LlamaForCausalLM(LLAMA), config)
    model.save_pretrained(folder)
    return {
        name.removeprefix("base_model.model."): module.get_delta_weight("default").detach()
        for name, module in model.named_modules()
        if name.endswith(("q_proj", "v_proj"))
    }


def compose(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Run what the page shows in a folder that has both adapters."""
    (text,) = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    monkeypatch.chdir(folder)
    exec(compile(text, "docs/adapters.md", "exec"), {"base": LlamaForCausalLM(LLAMA)})
    return folder / "composed" / "both"


@pytest.mark.parametrize("rslora", [False, True])
def test_pitfalls_two_adapters_that_are_one_do_what_both_did(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rslora: bool
) -> None:
    support, sql = (train(tmp_path / name, RANK, rslora=rslora) for name in ("support", "sql"))
    composed = compose(tmp_path, monkeypatch)
    assert check(composed).rank == 2 * RANK
    loaded = load_as_vllm_does(composed).loras
    assert loaded.keys() == support.keys() == sql.keys()
    for module, lora in loaded.items():
        both = support[module] + sql[module]
        served = lora.lora_b.float() @ lora.lora_a.float()
        # Kept in bfloat16.
        torch.testing.assert_close(served, both, rtol=0.02, atol=0.02 * float(both.abs().max()))


def test_pitfalls_ranks_add_up_and_have_to_be_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tmp_path / "support", RANK, rslora=True)
    train(tmp_path / "sql", MAX_LORA_RANK, rslora=True)
    told = findings(compose(tmp_path, monkeypatch))
    assert any(f"r is {RANK + MAX_LORA_RANK}, and ranks up to {MAX_LORA_RANK}" in t for t in told)
