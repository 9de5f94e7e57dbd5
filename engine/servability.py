"""Whether an adapter that is yet to be trained could be served: vLLM's rules before the training.

The same rules are asked of every adapter that comes in; here there is only its config, so that
nobody trains for hours what would be refused at the end.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from engine.adapter_config import check_fields
from engine.base_model import ModuleShapes
from engine.findings import Findings, quote

MAX_NAMED_MODULES = 20
"""That a finding tells to choose among."""


def trainable_modules(shapes: ModuleShapes) -> tuple[str, ...]:
    """Last names of the modules that an adapter can be trained on, sorted."""
    return tuple(sorted({module.rpartition(".")[2] for module in shapes}))


def servability_findings(
    config: Mapping[str, Any], shapes: ModuleShapes, max_lora_rank: int
) -> list[tuple[str, str]]:
    """Why an adapter of this `adapter_config.json` could not be served; empty if it could.

    Each is a field of the config, empty for the whole of it, and a sentence for its author.
    `shapes` are the linear layers of the base model, which are all that is trained.
    """
    by_field: dict[str, Findings] = defaultdict(Findings)
    check_fields(config, max_lora_rank, lambda field: by_field[field])
    _check_targets(config.get("target_modules"), shapes, by_field["target_modules"])
    return [
        (field, sentence)
        for field, findings in by_field.items()
        for sentence in findings.sentences()
    ]


def _check_targets(targets: Any, shapes: ModuleShapes, findings: Findings) -> None:
    """Each must be the last name of a module: that is what trainers are told, and estimates
    count by."""
    if not isinstance(targets, list | tuple):
        return  # refused above, or a regular expression, which is applied when training begins
    paths = [quote(target) for target in targets if "." in target]
    if paths:
        findings.add(
            "target_modules must be last names of modules, as q_proj and not self_attn.q_proj; "
            "they are trained in every layer",
            paths,
        )
    names = trainable_modules(shapes)
    missing = [quote(target) for target in targets if "." not in target and target not in names]
    if missing:
        known = ", ".join(names[:MAX_NAMED_MODULES])
        findings.add(
            "target_modules has names of no linear layer of the decoder, and no others are "
            f"trained: choose among {known}",
            missing,
        )
