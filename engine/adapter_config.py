"""What `adapter_config.json` asks for, and whether vLLM would do just that.

vLLM's own rules (`PEFTHelper.validate_legal`) are asked too, but they come last: they stop at
types they did not expect, and do not know what PEFT has learned since. A feature that they
overlook would be served as plain LoRA, with other answers than in training.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.findings import Findings, quote
from store.artifacts import CONFIG_FILE, MAX_CONFIG_BYTES

if TYPE_CHECKING:
    from vllm.lora.peft_helper import PEFTHelper

MAX_PATTERNS = 400
"""Keys of rank_pattern and alpha_pattern together. vLLM matches each module against each key
in the engine's own loop (vllm/lora/peft_helper.py:123), and the regex package keeps 500
compiled patterns: 224 modules take 0.8 s with 400 keys, but 18 s with 600 and 250 s with
6,000, while every stream of the shard stands still."""
MAX_VLLM_ERROR_CHARACTERS = 500
"""Of vLLM's own words; its longest refusal has 340."""

_LITERAL = re.compile(r"\^?[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")
"""A dotted module name or the end of one; PEFT's documentation puts a `^` before whole ones."""

_REFUSED = {
    "use_dora": "DoRA needs its magnitude vectors, which vLLM does not apply: train with "
    "use_dora false",
    "lora_bias": "a bias of lora_B is not applied by vLLM: train with lora_bias false",
    "modules_to_save": "full copies of modules (modules_to_save) are not served: leave them out, "
    "and target those modules with LoRA",
    "trainable_token_indices": "retrained tokens (trainable_token_indices) are not served: leave "
    "them out, and target embed_tokens with LoRA",
    "target_parameters": "LoRA on bare parameters (target_parameters), such as fused experts, is "
    "not served: target linear modules",
    "alora_invocation_tokens": "Activated LoRA is not applied by vLLM: train without "
    "alora_invocation_tokens",
    "layer_replication": "vLLM does not replicate layers: train without layer_replication",
    "use_bdlora": "block-diagonal LoRA is not applied by vLLM: train without use_bdlora",
    "use_qalora": "QALoRA is not applied by vLLM: train with use_qalora false",
    # vLLM 0.32 does not know these, and would serve them as plain LoRA.
    "arrow_config": "Arrow's routing is not applied by vLLM: train without arrow_config",
    "kasa_config": "KaSA's diagonal is not applied by vLLM: train without kasa_config",
    "monteclora_config": "MonteCLoRA is not applied by vLLM: train without monteclora_config",
}
"""Features of PEFT that change the answer and that vLLM leaves out, and what to do."""

_RANK_FIELDS = frozenset({"r", "rank_pattern"})
_SCALING_FIELDS = _RANK_FIELDS | {"lora_alpha", "alpha_pattern", "use_rslora"}
_STAND_INS: Mapping[str, Any] = {"r": 1, "lora_alpha": 1, "target_modules": []}
"""For refused fields that `PEFTHelper` cannot do without, so that it can judge the others."""


@dataclass(frozen=True, slots=True)
class LoraRules:
    """Rank and scaling of each module, as far as the config could be understood."""

    max_rank: int
    _ranks: PEFTHelper | None = None
    _scalings: PEFTHelper | None = None

    def rank(self, module: str) -> int | None:
        """Rank that the module's tensors must have; None if the config does not tell."""
        return None if self._ranks is None else self._ranks.get_rank_and_scaling(module)[0]

    def scaling(self, module: str) -> float:
        """What vLLM multiplies lora_B with; 1.0 if the config does not tell."""
        return 1.0 if self._scalings is None else self._scalings.get_rank_and_scaling(module)[1]


def check_config(path: Path, max_lora_rank: int, findings: Findings) -> LoraRules:
    """Read the config and add to `findings` what is wrong with it."""
    config = _read(path, findings)
    if config is None:
        return LoraRules(max_lora_rank)
    return check_fields(config, max_lora_rank, lambda field: findings)


def check_fields(
    config: Mapping[str, Any], max_lora_rank: int, findings_of: Callable[[str], Findings]
) -> LoraRules:
    """Add what is wrong with a config to the findings of each of its fields; those of the
    empty name are of the whole.
    """
    refused = {
        field
        for field, check in _FIELD_CHECKS.items()
        if not check(config.get(field), max_lora_rank, findings_of(field))
    }
    patterns = [config.get("rank_pattern"), config.get("alpha_pattern")]
    if sum(len(pattern) for pattern in patterns if isinstance(pattern, dict)) > MAX_PATTERNS:
        findings_of("rank_pattern").add(
            f"rank_pattern and alpha_pattern have more than {MAX_PATTERNS} keys together: write "
            "the ends of module names, which stand for all layers"
        )
        refused |= {"rank_pattern", "alpha_pattern"}
    for field, sentence in _REFUSED.items():
        if config.get(field):
            findings_of(field).add(sentence)
            refused.add(field)
    return _ask_vllm(config, refused, max_lora_rank, findings_of(""))


def _read(path: Path, findings: Findings) -> dict[str, Any] | None:
    if not path.is_file():
        findings.add(f"{CONFIG_FILE} is missing: save the adapter with PEFT's save_pretrained")
        return None
    with path.open("rb") as file:
        content = file.read(MAX_CONFIG_BYTES + 1)
    if len(content) > MAX_CONFIG_BYTES:
        findings.add(
            f"{CONFIG_FILE} has more than {MAX_CONFIG_BYTES} bytes, and PEFT writes less than "
            "2,000: save the adapter again"
        )
        return None
    try:
        # As text, because vLLM reads text: json itself would also take UTF-16 bytes.
        config = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        findings.add(f"{CONFIG_FILE} is not JSON ({quote(str(error))}): save the adapter again")
        return None
    if not isinstance(config, dict):
        findings.add(f"{CONFIG_FILE} is not a JSON object: save the adapter again")
        return None
    return config


def _ask_vllm(
    config: Mapping[str, Any], refused: set[str], max_lora_rank: int, findings: Findings
) -> LoraRules:
    """vLLM's own rules, on the fields that are not refused yet: nothing is said twice."""
    from vllm.config.lora import LoRAConfig
    from vllm.lora.peft_helper import PEFTHelper

    rest = {field: value for field, value in config.items() if field not in refused}
    limits = LoRAConfig(max_lora_rank=max_lora_rank)  # type: ignore[arg-type]  # a literal
    try:
        helper = PEFTHelper.from_dict({**_STAND_INS, **rest})
        helper.validate_legal(limits)
    except Exception as error:  # it trusts the types that it finds, so anything may be raised
        said = " ".join(str(error).split())[:MAX_VLLM_ERROR_CHARACTERS]
        findings.add(f"vLLM refuses {CONFIG_FILE}, correct it: {said}")
        return LoraRules(max_lora_rank)
    return LoraRules(
        max_lora_rank,
        None if refused & _RANK_FIELDS else helper,
        None if refused & _SCALING_FIELDS else helper,
    )


# --- one check a field: True if it can be used as it is


def _check_peft_type(value: Any, _: int, findings: Findings) -> bool:
    if value == "LORA":
        return True
    findings.add(f"peft_type is {quote(value)}, and only LORA is served: train a LoRA adapter")
    return False


def _check_rank(value: Any, max_lora_rank: int, findings: Findings) -> bool:
    if not _is_rank(value):
        findings.add(f"r is {quote(value)}, and must be the rank, a whole number from 1")
        return False
    if value > max_lora_rank:
        findings.add(
            f"r is {quote(value)}, and ranks up to {max_lora_rank} are served: train with a lower "
            "r, or start the gateway with a higher --max-lora-rank"
        )
        return False
    return True


def _check_alpha(value: Any, _: int, findings: Findings) -> bool:
    if _is_finite_number(value):
        return True
    findings.add(f"lora_alpha is {quote(value)}, and must be a finite number")
    return False


def _check_rslora(value: Any, _: int, findings: Findings) -> bool:
    if value is None or isinstance(value, bool):
        return True
    findings.add(f"use_rslora is {quote(value)}, and must be true or false")
    return False


def _check_bias(value: Any, _: int, findings: Findings) -> bool:
    if value is None or value == "none":
        return True
    findings.add(f'bias is {quote(value)}, and trained biases are not served: train with "none"')
    return False


def _check_target_modules(value: Any, _: int, findings: Findings) -> bool:
    """A list of names; or text, a regular expression that PEFT applied when training began.

    Unsloth writes the latter. It is let through unread, because vLLM goes by the names of the
    tensors, and only wants the field to be there (vllm/lora/peft_helper.py:30).
    """
    if isinstance(value, str) and value:
        return True
    if isinstance(value, list) and value and all(_is_literal(name) for name in value):
        return True
    findings.add(
        f"target_modules is {quote(value)}, and must be a list of module names, as PEFT's "
        "save_pretrained writes it"
    )
    return False


def _check_rank_pattern(value: Any, max_lora_rank: int, findings: Findings) -> bool:
    wanted = f"a rank from 1 to {max_lora_rank}"
    return _check_pattern(
        "rank_pattern",
        value,
        wanted,
        lambda rank: _is_rank(rank) and bool(rank <= max_lora_rank),
        findings,
    )


def _check_alpha_pattern(value: Any, _: int, findings: Findings) -> bool:
    return _check_pattern("alpha_pattern", value, "a finite number", _is_finite_number, findings)


def _check_pattern(
    field: str, value: Any, wanted: str, is_wanted: Callable[[Any], bool], findings: Findings
) -> bool:
    if value is None:
        return True
    if not isinstance(value, dict):
        findings.add(f"{field} is {quote(value)}, and must map module names to {wanted}")
        return False
    # vLLM compiles every key.
    expressions = [quote(key) for key in value if not _is_literal(key)]
    unwanted = [quote(key) for key, entry in value.items() if not is_wanted(entry)]
    if expressions:
        findings.add(
            f"{field} has keys that are regular expressions: write module names, or their ends",
            expressions,
        )
    if unwanted:
        findings.add(f"{field} must give {wanted} to each module, and does not to", unwanted)
    return not expressions and not unwanted


_FIELD_CHECKS: Mapping[str, Callable[[Any, int, Findings], bool]] = {
    "peft_type": _check_peft_type,
    "r": _check_rank,
    "lora_alpha": _check_alpha,
    "use_rslora": _check_rslora,
    "bias": _check_bias,
    "target_modules": _check_target_modules,
    "rank_pattern": _check_rank_pattern,
    "alpha_pattern": _check_alpha_pattern,
}


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_finite_number(value: Any) -> bool:
    # By comparison: `math.isfinite` raises on whole numbers that no float can hold.
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and abs(value) <= sys.float_info.max


def _is_literal(value: Any) -> bool:
    return isinstance(value, str) and _LITERAL.fullmatch(value) is not None
