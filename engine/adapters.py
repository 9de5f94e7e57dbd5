"""Whether an adapter may be served: everything that is wrong with it, before an engine sees it.

vLLM checks little, and late. A shape too large raises in the middle of a load and leaves half
an adapter over another tenant's weights (vllm/lora/model_manager.py:363); one too small is
copied into a corner without a word (vllm/lora/layers/base_linear.py:162); NaNs, and modules
that the base model has not, are no matter to it. Nothing that passes here does any of that.

The bytes are hostile until proven otherwise. They are read within bounds, by the parser that
vLLM uses, one tensor at a time, and no text of theirs becomes a regular expression.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.adapter_config import LoraRules, check_config
from engine.base_model import HEADER_LENGTH, ModuleShapes
from engine.errors import AdapterInvalid
from engine.findings import Findings, quote
from store.artifacts import CONFIG_FILE, WEIGHTS_FILE

MAX_HEADER_BYTES = 4 * 1024**2
"""A header takes 150 bytes a tensor: 0.3 MB for 126 layers with 7 modules each."""
MAX_TENSORS = 16_384
"""1,000 layers with 8 modules each have as many."""

FLOAT_TYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}
"""Types of the safetensors format that LoRA weights come in, as torch calls them."""
BASE_LAYER_SUFFIX = ".base_layer.weight"
PEFT_PREFIX = "base_model.model."


@dataclass(frozen=True, slots=True)
class AdapterFacts:
    """What is known of an adapter that may be served."""

    rank: int
    """The highest of its modules."""
    target_modules: tuple[str, ...]
    """Last names of the modules that it changes, sorted; by its tensors, not its config."""
    num_modules: int
    num_tensors: int
    num_parameters: int
    """Of the LoRA tensors."""
    dtype: str
    """Of the LoRA tensors, as torch calls it; `mixed` if they differ."""


def check_adapter(
    folder: Path,
    *,
    adapter: str,
    shapes: ModuleShapes,
    max_lora_rank: int,
    dtype: str = "bfloat16",
) -> AdapterFacts:
    """Check the adapter in `folder` against the base model that `shapes` describes.

    `max_lora_rank` is the engine's, one of vLLM's choices (vllm/config/lora.py:26). `dtype` is
    the one that the engine keeps adapters in, which is the base model's. Nobody may write to
    the folder meanwhile. Reads every tensor once, as fast as the disk gives it: call it in a
    thread.

    Raises AdapterInvalid with every finding.
    """
    findings = Findings()
    rules = check_config(folder / CONFIG_FILE, max_lora_rank, findings)
    weights = _Weights(shapes, rules, dtype, findings)
    weights.check(folder / WEIGHTS_FILE)
    if not findings.sentences() and not weights.has_effect:
        findings.add(
            "lora_A or lora_B of every module is zero, so it would change nothing: save the "
            "adapter after it was trained"
        )
    if sentences := findings.sentences():
        raise AdapterInvalid(adapter, sentences)
    return weights.facts()


class _Weights:
    """One pass over `adapter_model.safetensors`; adds what is wrong to the findings."""

    def __init__(
        self, shapes: ModuleShapes, rules: LoraRules, dtype: str, findings: Findings
    ) -> None:
        self._shapes = shapes
        self._rules = rules
        self._dtype = dtype
        self._findings = findings
        self._num_tensors = 0
        self._num_parameters = 0
        self._ranks: dict[str, int] = {}
        self._dtypes: set[str] = set()
        self.has_effect = False

    def check(self, path: Path) -> None:
        from safetensors import SafetensorError, safe_open

        if not path.is_file():
            self._findings.add(
                f"{WEIGHTS_FILE} is missing: save the adapter with PEFT's save_pretrained"
            )
            return
        with path.open("rb") as file:
            (header_bytes,) = HEADER_LENGTH.unpack(file.read(HEADER_LENGTH.size).ljust(8, b"\0"))
        if header_bytes > MAX_HEADER_BYTES:
            self._findings.add(
                f"{WEIGHTS_FILE} begins with a header of {header_bytes} bytes, and the limit is "
                f"{MAX_HEADER_BYTES}: it is damaged or no safetensors file, save it again"
            )
            return
        try:
            # vLLM's own parser, so that no file can mean one thing here and another there.
            with safe_open(path, framework="pt") as tensors:
                self._check_tensors(tensors)
        except (SafetensorError, OSError) as error:
            self._findings.add(
                f"{WEIGHTS_FILE} is damaged or no safetensors file ({quote(str(error))}): save "
                "the adapter again"
            )

    def _check_tensors(self, tensors: Any) -> None:
        names = tensors.keys()
        self._num_tensors = len(names)
        if len(names) > MAX_TENSORS:
            self._findings.add(
                f"{WEIGHTS_FILE} has {len(names)} tensors, and the limit is {MAX_TENSORS}: save "
                "the adapter alone, without the base model"
            )
            return
        pairs = self._pair(tensors, names)
        if not pairs:
            self._findings.add(
                f"{WEIGHTS_FILE} has no LoRA weights, so it would change nothing: save the "
                "adapter after it was trained"
            )
        for module, pair in pairs.items():
            if module in self._shapes:
                self._check_module(tensors, module, pair)
            else:
                self._findings.add(
                    "the base model has no such modules, or vLLM cannot adapt them: train the "
                    "adapter on the base model that is served",
                    [quote(module)],
                )

    def _pair(self, tensors: Any, names: list[str]) -> dict[str, dict[str, str]]:
        """Module to the names of its tensors, by `lora_A` and `lora_B`."""
        from vllm.lora.utils import is_base_embedding_weights, parse_fine_tuned_lora_name

        pairs: dict[str, dict[str, str]] = {}
        for name in names:
            if is_base_embedding_weights(name):
                self._check_base_embedding(tensors, name)
                continue
            try:
                module, is_lora_a = parse_fine_tuned_lora_name(name)
            except ValueError:
                self._findings.add(
                    "only weights of lora_A and lora_B are served, so what these tensors do "
                    "would be lost: train an adapter of LoRA alone",
                    [quote(name)],
                )
                continue
            side = "lora_A" if is_lora_a else "lora_B"
            if side in pairs.setdefault(module, {}):
                self._findings.add(
                    "these tensors are there twice, under two names: save the adapter again",
                    [f"{side} of {quote(module)}"],
                )
            pairs[module][side] = name
        return pairs

    def _check_base_embedding(self, tensors: Any, name: str) -> None:
        """PEFT adds a copy of the base embedding that it adapts. vLLM leaves it out, which is
        right only if it is the base model's (vllm/lora/utils.py:223)."""
        module = name.removeprefix(PEFT_PREFIX).removesuffix(BASE_LAYER_SUFFIX)
        shape = tensors.get_slice(name).get_shape()
        if sorted(shape) != sorted(self._shapes.get(module, ())):
            self._findings.add(
                "the vocabulary was resized for training, and only that of the base model is "
                "served: train without new tokens",
                [quote(name)],
            )

    def _check_module(self, tensors: Any, module: str, pair: Mapping[str, str]) -> None:
        out_features, in_features = self._shapes[module]
        rank = self._rules.rank(module)
        effect = 1.0
        for side in ("lora_A", "lora_B"):
            if side not in pair:
                self._findings.add(
                    "lora_A and lora_B belong together, and one is missing: save the adapter again",
                    [f"{side} of {module}"],
                )
                continue
            name = pair[side]
            header = tensors.get_slice(name)
            shape, float_type = header.get_shape(), FLOAT_TYPES.get(header.get_dtype())
            wanted = (rank, in_features) if side == "lora_A" else (out_features, rank)
            if not self._fits(shape, wanted):
                self._findings.add(
                    "tensors have other shapes than the base model and the rank in "
                    f"{CONFIG_FILE} ask for: train on the base model that is served",
                    [f"{side} of {module} is {shape} and must be {_show(wanted)}"],
                )
                continue
            if float_type is None:
                self._findings.add(
                    f"tensors must be of {', '.join(sorted(FLOAT_TYPES))}: save the adapter in "
                    "one of these",
                    [f"{side} of {module} is {quote(header.get_dtype())}"],
                )
                continue
            self._dtypes.add(float_type)
            self._num_parameters += math.prod(shape)
            self._ranks[module] = shape[0] if side == "lora_A" else shape[1]
            effect *= self._check_values(tensors, name, module, side)
        self.has_effect |= effect > 0.0

    def _fits(self, shape: list[int], wanted: tuple[int | None, int | None]) -> bool:
        return len(shape) == len(wanted) and all(
            size == fixed if fixed is not None else 1 <= size <= self._rules.max_rank
            for size, fixed in zip(shape, wanted, strict=True)
        )

    def _check_values(self, tensors: Any, name: str, module: str, side: str) -> float:
        """The largest magnitude that the engine will hold of this tensor."""
        import torch

        low, high = (float(edge) for edge in torch.aminmax(tensors.get_tensor(name)))
        if not (math.isfinite(low) and math.isfinite(high)):  # aminmax passes NaN on
            self._findings.add(
                "tensors hold NaN or infinity: the training diverged, train again with a lower "
                "learning rate",
                [f"{side} of {module}"],
            )
            return math.inf
        # vLLM scales lora_B once, after the cast (vllm/lora/lora_weights.py:41).
        scaling = abs(self._rules.scaling(module)) if side == "lora_B" else 1.0
        largest = max(abs(low), abs(high))
        if largest * max(1.0, scaling) > torch.finfo(getattr(torch, self._dtype)).max:
            self._findings.add(
                f"tensors become infinite in {self._dtype}, which the engine keeps adapters in: "
                "train again with a lower lora_alpha or learning rate",
                [f"{side} of {module}"],
            )
        return largest * scaling

    def facts(self) -> AdapterFacts:
        """Once there are no findings."""
        return AdapterFacts(
            rank=max(self._ranks.values()),
            target_modules=tuple(sorted({module.rpartition(".")[2] for module in self._ranks})),
            num_modules=len(self._ranks),
            num_tensors=self._num_tensors,
            num_parameters=self._num_parameters,
            dtype=self._dtypes.pop() if len(self._dtypes) == 1 else "mixed",
        )


def _show(shape: tuple[int | None, int | None]) -> str:
    return f"[{', '.join('r' if size is None else str(size) for size in shape)}]"
