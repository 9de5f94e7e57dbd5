"""A Llama with random weights, for measurements: right for speed and memory, wrong for quality."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from trainer.rows import IGNORED, ROWS_FILE


def write_model(folder: Path, *, tiny: bool) -> None:
    """Llama-3.1-8B's shape, made on the GPU; or a tiny one, on the CPU."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cpu" if tiny else "cuda"):
        model = LlamaForCausalLM(_config(tiny=tiny))
    model.save_pretrained(folder, max_shard_size="4GB")
    _write_tokenizer(folder)


def write_shape(folder: Path, *, tiny: bool, layers: int | None = None) -> Path:
    """The same without weights, for engines that make some up (`load_format` "dummy")."""
    config = _config(tiny=tiny)
    config.architectures = [LlamaForCausalLM.__name__]
    config.num_hidden_layers = layers or config.num_hidden_layers
    config.save_pretrained(folder)
    _write_tokenizer(folder)
    return folder


def _config(*, tiny: bool) -> LlamaConfig:
    small = dict(
        vocab_size=1024,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    llama_3_1_8b = dict(
        vocab_size=128_256,
        hidden_size=4096,
        intermediate_size=14_336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
    )
    return LlamaConfig(
        **(small if tiny else llama_3_1_8b),
        max_position_embeddings=8192,
        rope_theta=500_000.0,
        rms_norm_eps=1e-5,
        bos_token_id=1,
        eos_token_id=2,
        dtype="bfloat16",
    )


def _write_tokenizer(folder: Path) -> None:
    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{at}": at for at in range(3, 1000)}
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="<pad>")),
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
    ).save_pretrained(folder)


def write_rows(folder: Path, *, count: int, tokens: int) -> None:
    """Prepared rows of the same length; two thirds are trained on."""
    input_ids, labels = [], []
    for row in range(count):
        ids = [3 + (row * 131 + at * (row % 7 + 1)) % 997 for at in range(tokens)]
        input_ids.append(ids)
        labels.append([IGNORED] * (tokens // 3) + ids[tokens // 3 :])
    folder.mkdir(exist_ok=True)
    table = {
        "line": pa.array(range(1, len(input_ids) + 1), pa.int64()),
        "input_ids": pa.array(input_ids, pa.list_(pa.int32())),
        "labels": pa.array(labels, pa.list_(pa.int32())),
    }
    pq.write_table(pa.table(table), folder / ROWS_FILE)
