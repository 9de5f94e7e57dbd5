"""Configs that vLLM would misread, or that PEFT did not write."""

from __future__ import annotations

import gzip
import io
import json
import math
import zipfile

from engine.adapter_config import MAX_PATTERNS
from store.artifacts import CONFIG_FILE
from tests.corpus.broken import Kind, spoiled
from tests.corpus.draft import BOMB, Draft, Spoil, config_is, configure, lacks_field

BOMB_BYTES = 32 * 1024**2
"""What the archives unpack to; packed they are smaller than the limit of a config."""


def encoded(encoding: str) -> Spoil:
    def spoil(draft: Draft) -> None:
        draft.config_bytes = json.dumps(draft.config).encode(encoding)

    return spoil


def cut(draft: Draft) -> None:
    draft.config_bytes = draft.encoded_config()[:-1]


def last_rank_wins(draft: Draft) -> None:
    draft.config_bytes = draft.encoded_config()[:-1] + b', "r": 64}'


def zip_bomb() -> bytes:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as bomb:
        bomb.writestr(CONFIG_FILE, bytes(BOMB_BYTES))
    return archive.getvalue()


NO_JSON = spoiled(
    Kind.CONFIG,
    {
        "config-is-empty": (config_is(b""), "is not JSON"),
        "config-is-prose": (config_is(b"not json"), "is not JSON"),
        "config-is-cut": (cut, "is not JSON"),
        "config-in-utf-16": (encoded("utf-16"), "is not JSON"),
        "config-in-utf-32": (encoded("utf-32"), "is not JSON"),
        "config-with-bom": (encoded("utf-8-sig"), "is not JSON"),
        "config-is-no-utf-8": (config_is(b'{"peft_type": "LORA\xff"}'), "is not JSON"),
        "config-is-zip-bomb": (config_is(zip_bomb()), "is not JSON"),
        "config-is-gzip-bomb": (config_is(gzip.compress(bytes(BOMB_BYTES))), "is not JSON"),
        "config-is-deep-list": (config_is(b"[" * 60_000), "is not JSON"),
        "config-is-deep-object": (config_is(b'{"r":' * 12_000), "is not JSON"),
        "config-with-long-number": (config_is(b'{"r": ' + b"9" * 5000 + b"}"), "is not JSON"),
        "config-is-list": (config_is(b"[1]"), "is not a JSON object"),
        "config-is-null": (config_is(b"null"), "is not a JSON object"),
        "config-is-text": (config_is(b'"LORA"'), "is not a JSON object"),
    },
)

FIELDS = spoiled(
    Kind.CONFIG,
    {
        "peft-type-adalora": (configure(peft_type="ADALORA"), "'ADALORA', and only LORA is"),
        "peft-type-ia3": (configure(peft_type="IA3"), "'IA3', and only LORA is served"),
        "peft-type-prefix": (configure(peft_type="PREFIX_TUNING"), "and only LORA is served"),
        "peft-type-missing": (lacks_field("peft_type"), "peft_type is None"),
        "rank-missing": (lacks_field("r"), "r is None, and must be the rank"),
        "rank-zero": (configure(r=0), "r is 0, and must be the rank"),
        "rank-negative": (configure(r=-8), "r is -8, and must be the rank"),
        "rank-text": (configure(r="8"), "r is '8', and must be the rank"),
        "rank-float": (configure(r=8.0), r"r is 8\.0, and must be the rank"),
        "rank-true": (configure(r=True), "r is True, and must be the rank"),
        "rank-too-high-in-config": (configure(r=64), r"r is 64, and ranks up to \d+ are served"),
        "rank-twice-in-config": (last_rank_wins, r"r is 64, and ranks up to \d+ are served"),
        "rank-astronomical": (configure(r=10**400), r"and ranks up to \d+ are served"),
        "alpha-missing": (lacks_field("lora_alpha"), "lora_alpha is None, and must be a finite"),
        "alpha-text": (configure(lora_alpha="16"), "lora_alpha is '16', and must be a finite"),
        "alpha-nan": (configure(lora_alpha=math.nan), "lora_alpha is nan, and must be a finite"),
        "alpha-inf": (configure(lora_alpha=math.inf), "lora_alpha is inf, and must be a finite"),
        "alpha-astronomical": (configure(lora_alpha=10**400), "and must be a finite number"),
        "rslora-text": (configure(use_rslora="false"), "must be true or false"),
        "targets-missing": (lacks_field("target_modules"), "target_modules is None"),
        "targets-none": (configure(target_modules=[]), r"target_modules is \[\], and must be"),
        "targets-number": (configure(target_modules=["q_proj", 7]), r"\['q_proj', 7\], and must"),
        "targets-regex": (configure(target_modules=[BOMB]), "and must be a list of module names"),
    },
)

FEATURES = spoiled(
    Kind.CONFIG,
    {
        "bias-all": (configure(bias="all"), "bias is 'all', and trained biases are not served"),
        "bias-lora-only": (configure(bias="lora_only"), "trained biases are not served"),
        "bias-null": (configure(bias=None), "vLLM refuses .* Adapter bias is not"),
        "bias-of-lora-b": (configure(lora_bias=True), "a bias of lora_B is not applied"),
        "dora": (configure(use_dora=True), "DoRA needs its magnitude vectors"),
        "saves-modules": (configure(modules_to_save=["lm_head"]), "full copies of modules"),
        "saves-classifier": (configure(modules_to_save=["classifier"]), "full copies of modules"),
        "trains-tokens": (configure(trainable_token_indices=[1]), "retrained tokens"),
        "trains-parameters": (configure(target_parameters=["mlp.experts"]), "bare parameters"),
        "alora": (configure(alora_invocation_tokens=[1, 2]), "Activated LoRA is not applied"),
        "layer-replication": (configure(layer_replication=[[0, 4]]), "not replicate layers"),
        "bd-lora": (configure(use_bdlora={"nblocks": 2}), "block-diagonal LoRA is not applied"),
        "qalora": (configure(use_qalora=True), "QALoRA is not applied"),
        "arrow": (configure(arrow_config={"top_k": 2}), "Arrow's routing is not applied"),
        "kasa": (configure(kasa_config={"beta": 1}), "KaSA's diagonal is not applied"),
        "monteclora": (configure(monteclora_config={"x": 1}), "MonteCLoRA is not applied"),
        "init-pissa": (configure(init_lora_weights="pissa"), "init_lora_weights='pissa'"),
        "init-pissa-niter": (configure(init_lora_weights="pissa_niter_4"), "='pissa_niter_4'"),
        "init-olora": (configure(init_lora_weights="olora"), "init_lora_weights='olora'"),
        "init-loftq": (configure(init_lora_weights="loftq"), "init_lora_weights='loftq'"),
        "init-corda": (configure(init_lora_weights="corda"), "init_lora_weights='corda'"),
    },
)

PATTERNS = spoiled(
    Kind.CONFIG,
    {
        "pattern-parenthesis": (configure(rank_pattern={"(": 8}), "keys that are regular expre"),
        "pattern-repeats": (configure(rank_pattern={"a{99999}": 8}), "that are regular expression"),
        "pattern-bomb": (configure(rank_pattern={BOMB: 8}), "write module names, or their ends"),
        "pattern-of-alpha": (configure(alpha_pattern={".*q_proj": 8}), "alpha_pattern has keys"),
        "pattern-list": (configure(rank_pattern=[8]), r"rank_pattern is \[8\], and must map"),
        "pattern-rank-text": (configure(rank_pattern={"q_proj": "8"}), "must give a rank from 1"),
        "pattern-rank-zero": (configure(rank_pattern={"q_proj": 0}), "must give a rank from 1"),
        "pattern-rank-high": (configure(rank_pattern={"q_proj": 64}), "must give a rank from 1"),
        "pattern-alpha-null": (configure(alpha_pattern={"q_proj": None}), "give a finite number"),
        "pattern-alpha-inf": (
            configure(alpha_pattern={"q_proj": math.inf}),
            "alpha_pattern must give a finite number",
        ),
        "patterns-too-many": (
            configure(alpha_pattern={f"m{n}": 8 for n in range(MAX_PATTERNS + 1)}),
            r"more than \d+ keys together",
        ),
    },
)

CONFIGS = (*NO_JSON, *FIELDS, *FEATURES, *PATTERNS)
