"""A config that vLLM would misread, or PEFT did not write, is refused by its own finding.

The corpus is a list: a way to spoil a good adapter, and the finding that must come of it.
"""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import pytest

from engine.adapter_config import MAX_PATTERNS
from store.artifacts import CONFIG_FILE, MAX_CONFIG_BYTES
from tests.engine.drafts import (
    BOMB,
    Draft,
    Spoil,
    check,
    configure,
    findings,
    good_config,
    lacks_field,
    load_as_vllm_does,
)


def config_is(content: bytes) -> Spoil:
    return lambda draft: setattr(draft, "config_bytes", content)


CORPUS: list[tuple[Spoil, str]] = [
    (lambda draft: setattr(draft, "without", CONFIG_FILE), "adapter_config.json is missing"),
    (config_is(b"not json"), "adapter_config.json is not JSON"),
    (config_is(json.dumps(good_config()).encode("utf-16")), "adapter_config.json is not JSON"),
    (config_is(b"\xef\xbb\xbf" + json.dumps(good_config()).encode()), "is not JSON"),
    (config_is(b"[" * 60_000), "is not JSON"),
    (config_is(b'{"r": ' + b"9" * 5000 + b"}"), "is not JSON"),
    (config_is(b"[1]"), "adapter_config.json is not a JSON object"),
    (config_is(b"null"), "adapter_config.json is not a JSON object"),
    (config_is(b" " * (MAX_CONFIG_BYTES + 1)), "has more than 65536 bytes"),
    (configure(peft_type="ADALORA"), "peft_type is 'ADALORA', and only LORA is served"),
    (lacks_field("peft_type"), "peft_type is None"),
    (lacks_field("r"), "r is None, and must be the rank"),
    (configure(r=0), "r is 0, and must be the rank"),
    (configure(r=-8), "r is -8, and must be the rank"),
    (configure(r="8"), "r is '8', and must be the rank"),
    (configure(r=8.0), "r is 8.0, and must be the rank"),
    (configure(r=True), "r is True, and must be the rank"),
    (configure(r=64), "r is 64, and ranks up to 16 are served: train with a lower r, or start"),
    (configure(r=10**400), "and ranks up to 16 are served"),
    (lacks_field("lora_alpha"), "lora_alpha is None, and must be a finite number"),
    (configure(lora_alpha="16"), "lora_alpha is '16', and must be a finite number"),
    (configure(lora_alpha=math.nan), "lora_alpha is nan, and must be a finite number"),
    (configure(lora_alpha=math.inf), "lora_alpha is inf, and must be a finite number"),
    (configure(lora_alpha=10**400), "and must be a finite number"),
    (configure(use_rslora="false"), "use_rslora is 'false', and must be true or false"),
    (configure(bias="all"), "bias is 'all', and trained biases are not served"),
    (configure(bias=None), "vLLM refuses adapter_config.json, correct it: Adapter bias is not"),
    (configure(lora_bias=True), "a bias of lora_B is not applied"),
    (configure(use_dora=True), "DoRA needs its magnitude vectors"),
    (configure(modules_to_save=["lm_head"]), "full copies of modules (modules_to_save)"),
    (configure(modules_to_save=["classifier"]), "full copies of modules (modules_to_save)"),
    (configure(trainable_token_indices=[1]), "retrained tokens (trainable_token_indices)"),
    (configure(target_parameters=["mlp.experts"]), "LoRA on bare parameters"),
    (configure(alora_invocation_tokens=[1, 2]), "Activated LoRA is not applied"),
    (configure(layer_replication=[[0, 2]]), "vLLM does not replicate layers"),
    (configure(use_bdlora={"nblocks": 2}), "block-diagonal LoRA is not applied"),
    (configure(use_qalora=True), "QALoRA is not applied"),
    (configure(arrow_config={"top_k": 2}), "Arrow's routing is not applied"),
    (configure(kasa_config={"beta": 1}), "KaSA's diagonal is not applied"),
    (configure(monteclora_config={"x": 1}), "MonteCLoRA is not applied"),
    (configure(init_lora_weights="pissa"), "vLLM does not support init_lora_weights='pissa'"),
    (configure(init_lora_weights="olora"), "vLLM does not support init_lora_weights='olora'"),
    (lacks_field("target_modules"), "target_modules is None, and must be a list of module names"),
    (configure(target_modules=[]), "target_modules is [], and must be a list"),
    (configure(target_modules=["q_proj", 7]), "target_modules is ['q_proj', 7], and must be"),
    (configure(target_modules=[BOMB]), "target_modules is ['(a+)+$'], and must be a list"),
    (configure(rank_pattern={"(": 8}), "rank_pattern has keys that are regular expressions"),
    (configure(rank_pattern={BOMB: 8}), "write module names, or their ends: '(a+)+$'"),
    (configure(alpha_pattern={".*q_proj": 8}), "alpha_pattern has keys that are regular"),
    (configure(rank_pattern=[8]), "rank_pattern is [8], and must map module names to a rank"),
    (configure(rank_pattern={"q_proj": "8"}), "rank_pattern must give a rank from 1 to 16"),
    (configure(rank_pattern={"q_proj": 0}), "rank_pattern must give a rank from 1 to 16"),
    (configure(rank_pattern={"q_proj": 32}), "rank_pattern must give a rank from 1 to 16"),
    (configure(alpha_pattern={"q_proj": None}), "alpha_pattern must give a finite number"),
    (configure(alpha_pattern={"q_proj": math.inf}), "alpha_pattern must give a finite number"),
    (
        configure(alpha_pattern={f"m{n}": 8 for n in range(MAX_PATTERNS + 1)}),
        "rank_pattern and alpha_pattern have more than 400 keys together",
    ),
]


@pytest.mark.parametrize(("spoil", "expected"), CORPUS, ids=[expected for _, expected in CORPUS])
def test_a_broken_config_is_refused_with_its_own_finding_alone(
    tmp_path: Path, spoil: Spoil, expected: str
) -> None:
    draft = Draft()
    spoil(draft)
    draft.write(tmp_path)
    (found,) = findings(tmp_path)
    assert expected in found


def test_a_regular_expression_of_target_modules_is_never_run(tmp_path: Path) -> None:
    draft = Draft()
    draft.config["target_modules"] = "((.*)*)*" * 1000 + "("  # a bomb, and not even valid
    draft.write(tmp_path)
    check(tmp_path)
    load_as_vllm_does(tmp_path)


def test_the_most_patterns_that_pass_do_not_hold_the_engine_up(tmp_path: Path) -> None:
    draft = Draft()
    draft.config["alpha_pattern"] = {f"model.layers.{n}.x": 8 for n in range(MAX_PATTERNS)}
    draft.write(tmp_path)
    check(tmp_path)
    begin = time.thread_time()
    load_as_vllm_does(tmp_path)
    assert time.thread_time() - begin < 1.0
