"""The base model as its folder tells it, before any weight is loaded.

Two questions: which modules may an adapter change, and of what shape (`base_modules`);
and is this the same model as over there (`fingerprints`). Both block on the disk, and the
first imports torch, transformers and vLLM: call them in a thread.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.errors import ModelNotFound

ModuleShapes = Mapping[str, tuple[int, int]]
"""Dotted module name to (out_features, in_features): lora_A is [r, in], lora_B is [out, r]."""

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
WEIGHTS_INDEX_FILE = "model.safetensors.index.json"
TOKENIZER_FILES = (
    "added_tokens.json",
    "merges.txt",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "spiece.model",
    "tekken.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)
"""What tokenizers read, of every kind that vLLM serves; those that exist are fingerprinted."""
CHAT_TEMPLATE_FILE = "chat_template.jinja"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
MAX_HEADER_BYTES = 100_000_000
"""The safetensors format's own bound on a header."""
HEADER_LENGTH = struct.Struct("<Q")
"""How a safetensors file begins: the header's bytes, then the header."""


@dataclass(frozen=True, slots=True)
class BaseModules:
    """Every module of a base model that an adapter may change, with its shape."""

    linear: ModuleShapes
    """The linear layers of the text decoder."""
    embeddings: ModuleShapes = field(default_factory=dict)
    """Here `in` is the vocabulary. An adapter of these is served, and not trained: Unsloth would
    save full copies of them, which vLLM refuses, and PEFT cannot hold them in 4 bits."""

    @property
    def shapes(self) -> ModuleShapes:
        """Of all of them."""
        return {**self.linear, **self.embeddings}


def base_modules(model_path: Path) -> BaseModules:
    """What an adapter may change of the model in that folder.

    The embeddings are in it where vLLM's model class names them (`embedding_modules`,
    vllm/model_executor/models/interfaces.py:681; Llama and Qwen3 do, Qwen2 does not). The model
    is built from `config.json` on the meta device, so it needs neither memory nor weights, and a
    quantized checkpoint has the shapes of the model it stands for. Not in here: the output head
    (see `logits_without_lora` in `engine/core_plugin.py`), vision and audio towers, whose
    adapters vLLM ignores unless told otherwise (vllm/lora/model_manager.py:240), and experts,
    which are no linear layers in transformers.

    Raises ModelNotFound if transformers cannot build the model, or vLLM not import its class.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        # trust_remote_code is said, because unsaid it asks a question on the terminal.
        config = AutoConfig.from_pretrained(
            model_path, local_files_only=True, trust_remote_code=False
        )
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # whatever a config can make a model's constructor raise
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelNotFound(
            f"{model_path} is no model that transformers can build: {reason[0]}"
        ) from error

    names = {id(module): name for name, module in model.named_modules()}
    linear = {
        names[id(module)]: (module.out_features, module.in_features)
        for module in model.get_decoder().modules()
        if isinstance(module, torch.nn.Linear)
    }
    adaptable = _adaptable_embeddings(config.architectures or [type(model).__name__])
    embedding = model.get_input_embeddings()
    name = names[id(embedding)]
    if name.rpartition(".")[2] not in adaptable:
        return BaseModules(linear)
    return BaseModules(linear, {name: (embedding.embedding_dim, embedding.num_embeddings)})


def _adaptable_embeddings(architectures: list[str]) -> frozenset[str]:
    """Last names of the embedding modules that vLLM's class of the model can adapt."""
    from vllm.model_executor.models import ModelRegistry

    for architecture in architectures:
        registered = ModelRegistry.models.get(architecture)
        if registered is None:
            continue
        try:
            model_class = registered.load_model_cls()
        except ImportError as error:  # a multimodal model needs more packages than a text model
            raise ModelNotFound(f"vLLM cannot import {architecture}: {error}") from error
        return frozenset(getattr(model_class, "embedding_modules", {}))
    return frozenset()


@dataclass(frozen=True, slots=True)
class ModelFingerprints:
    """What is served, as lower-case hex SHA-256; `ModelFingerprints` of inference.proto."""

    config_sha256: str
    """Of `config.json` as it is."""
    weights_sha256: str
    """Of names, shapes and dtypes of all weights, not of their values, which would take
    minutes for a large model. Empty: the weights are not in safetensors."""
    tokenizer_sha256: str
    """Of the tokenizer's files, by name. Empty: there are none."""
    chat_template_sha256: str
    """Of the template's text. Empty: there is none."""


def fingerprints(model_path: Path) -> ModelFingerprints:
    """Fingerprints of a model folder. Raises ModelNotFound if its files cannot be read."""
    try:
        template = _chat_template(model_path)
        return ModelFingerprints(
            config_sha256=_sha256_file(model_path / CONFIG_FILE),
            weights_sha256=_sha256_json(_weights(model_path)),
            tokenizer_sha256=_sha256_json(
                {
                    name: _sha256_file(model_path / name)
                    for name in TOKENIZER_FILES
                    if (model_path / name).is_file()
                }
            ),
            chat_template_sha256=hashlib.sha256(template.encode()).hexdigest() if template else "",
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelNotFound(f"{model_path} cannot be read as a model folder: {error}") from error


def _weights(model_path: Path) -> dict[str, Any]:
    """Name to dtype and shape, of the files that vLLM would load."""
    index, single = model_path / WEIGHTS_INDEX_FILE, model_path / WEIGHTS_FILE
    if index.is_file():
        weight_map = json.loads(index.read_bytes())["weight_map"]
        files = [model_path / Path(name).name for name in sorted(set(weight_map.values()))]
    elif single.is_file():
        files = [single]
    else:
        files = sorted(model_path.glob("*.safetensors"))
    weights: dict[str, Any] = {}
    for file in files:
        for name, tensor in _read_header(file).items():
            if name != "__metadata__":
                weights[name] = [tensor["dtype"], tensor["shape"]]
    return weights


def _read_header(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        (size_bytes,) = HEADER_LENGTH.unpack(file.read(HEADER_LENGTH.size).ljust(8, b"\xff"))
        if size_bytes > MAX_HEADER_BYTES:
            raise ValueError(f"{path.name} is no safetensors file, or it is cut off")
        header = json.loads(file.read(size_bytes))
    if not isinstance(header, dict):
        raise ValueError(f"{path.name} is no safetensors file")
    return header


def _chat_template(model_path: Path) -> str:
    """As transformers finds it: a file of its own wins over the tokenizer's config."""
    own, config = model_path / CHAT_TEMPLATE_FILE, model_path / TOKENIZER_CONFIG_FILE
    if own.is_file():
        return own.read_text("utf-8")
    if not config.is_file():
        return ""
    template = json.loads(config.read_bytes()).get("chat_template") or ""
    if isinstance(template, list):  # several, by name
        template = {entry["name"]: entry["template"] for entry in template}.get("default", "")
    return str(template)


def _sha256_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sha256_json(content: dict[str, Any]) -> str:
    """Of one spelling for one content. Empty for nothing."""
    if not content:
        return ""
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()
