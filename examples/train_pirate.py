"""Train the adapter that ships in `examples/adapters/pirate`: minutes on two CPU cores.

    python examples/train_pirate.py

The flags make other versions of it; `examples/adapters/pirate-v2/README.md` has those of the
second one that ships.

Plain transformers and PEFT, to show that nothing about an adapter for the gateway is special.
The seed is fixed; another processor may still round its way to a slightly different adapter.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)

from engine.models import resolve_model

HERE = Path(__file__).parent
BASE_MODEL = "smollm2-135m"

TARGET_MODULES = ["down_proj", "o_proj", "v_proj"]
RANK, ALPHA = 4, 16
"""At rank 4 these three modules take just under 1 MB in 16 bits."""
ROWS_PER_STEP = 8

IGNORED = -100
"""The label of a token that is no part of the loss (torch.nn.CrossEntropyLoss)."""

HELD_OUT = (
    "What is the capital of France?",
    "How do I make a cup of tea?",
    "Why is the sky blue?",
)
"""Not in the data."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """What one version may be trained with differently from another."""

    epochs: int
    learning_rate: float
    seed: int


def main() -> None:
    """Train, save, and print how base model and adapter answer what is not in the data."""
    parser = argparse.ArgumentParser(description="Train the pirate adapter.")
    parser.add_argument("--data", type=Path, default=HERE / "data" / "pirate.jsonl")
    parser.add_argument("--output", type=Path, default=HERE / "adapters" / "pirate")
    parser.add_argument("--state-dir", type=Path, default=Path("state"))
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=17)
    options = parser.parse_args()
    recipe = Recipe(options.epochs, options.learning_rate, options.seed)

    set_seed(recipe.seed)
    folder = resolve_model(BASE_MODEL, options.state_dir)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    # Float32, because bfloat16 would round most small steps away.
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    before = [greedy_answer(base, tokenizer, prompt) for prompt in HELD_OUT]

    chats = [json.loads(line)["messages"] for line in options.data.read_text().splitlines()]
    rows = [encode(tokenizer, chat) for chat in chats]
    model = get_peft_model(base, lora_config())
    started_s = time.monotonic()
    train(model, tokenizer, rows, recipe)
    print(f"trained on {len(rows)} rows in {time.monotonic() - started_s:.0f} s")
    save(model, options.output)

    # From the files and not from memory: what is shown is what ships.
    served = PeftModel.from_pretrained(model.unload(), options.output).eval()
    for prompt, answer in zip(HELD_OUT, before, strict=True):
        print(f"\n{prompt}\n  base:    {answer}")
        print(f"  adapter: {greedy_answer(served, tokenizer, prompt)}")


def lora_config() -> LoraConfig:
    """What vLLM serves without conversion: no DoRA, no biases, no whole modules."""
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=RANK,
        lora_alpha=ALPHA,
        lora_dropout=0.05,
        use_rslora=True,
        bias="none",
        target_modules=TARGET_MODULES,
    )


def encode(
    tokenizer: PreTrainedTokenizerFast, messages: Sequence[Mapping[str, str]]
) -> dict[str, list[int]]:
    """Token ids of a chat that ends with the assistant, and labels for its last answer only.

    The answer's labels include `<|im_end|>`: ending a turn is to be learned too.
    """
    prompt = tokenizer.apply_chat_template(
        messages[:-1], tokenize=False, add_generation_prompt=True
    )
    prompt_ids = tokenizer(prompt)["input_ids"]
    answer_ids = tokenizer(messages[-1]["content"] + tokenizer.eos_token)["input_ids"]
    return {
        "input_ids": prompt_ids + answer_ids,
        "labels": [IGNORED] * len(prompt_ids) + answer_ids,
    }


def train(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerFast,
    rows: Sequence[Mapping[str, list[int]]],
    recipe: Recipe,
) -> None:
    """Train in place. The collator pads ids with the pad token and labels with IGNORED."""
    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            output_dir=scratch,
            use_cpu=True,
            seed=recipe.seed,
            num_train_epochs=recipe.epochs,
            per_device_train_batch_size=ROWS_PER_STEP,
            learning_rate=recipe.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=5,
            logging_steps=10,
            save_strategy="no",
            report_to="none",
        )
        Trainer(
            model=model,
            args=arguments,
            train_dataset=rows,
            data_collator=DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED),
        ).train()


def save(model: PeftModel, folder: Path) -> None:
    """Write `adapter_config.json` and float16 `adapter_model.safetensors`, and no more.

    PEFT's own `save_pretrained` would also write a README over ours, the weights in float32,
    and a config that names a folder of this machine as base model.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: tensor.to(torch.float16).contiguous()
        for name, tensor in get_peft_model_state_dict(model).items()
    }
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = model.peft_config["default"]
    config.base_model_name_or_path = BASE_MODEL
    config.inference_mode = True
    config.target_modules = TARGET_MODULES  # a set by now, which would be saved in any order
    config.save_pretrained(folder)


def greedy_answer(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerFast, prompt: str
) -> str:
    """The most likely answer to one user message, of at most 60 tokens."""
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}],
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
    )
    output = model.generate(**inputs, max_new_tokens=60, do_sample=False)
    answer_ids = output[0, inputs["input_ids"].shape[1] :]
    return str(tokenizer.decode(answer_ids, skip_special_tokens=True))


if __name__ == "__main__":
    main()
