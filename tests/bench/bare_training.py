"""The recipe as a bare script: what a notebook would do with the same rows and numbers.

    python -m tests.bench.bare_training RUN_FOLDER OUTPUT

Reads the plan of a run that the service made, and trains without any of the service: no events,
no stop, no reference, no manifest. Prints one JSON object.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

STARTED_S = time.time()


def main(run: Path, output: Path) -> None:
    """Train, save, and tell losses and times."""
    import unsloth  # type: ignore[import-not-found,import-untyped,unused-ignore]  # isort: skip
    import datasets
    import numpy as np
    import torch
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

    os.nice(5)  # as the service does on a CPU
    plan = json.loads((run / "plan.json").read_text())
    spec, lora = plan["spec"], plan["spec"]["lora"]
    asked = spec["hyperparameters"]
    model, tokenizer = unsloth.FastLanguageModel.from_pretrained(
        plan["model_path"],
        max_seq_length=spec["data"]["max_sequence_tokens"],
        dtype=getattr(torch, asked["precision"]),
        load_in_4bit=asked["quantization"] == "nf4",
        use_exact_model_name=True,
    )
    model = unsloth.FastLanguageModel.get_peft_model(
        model,
        r=lora["r"],
        lora_alpha=int(lora["alpha"]),
        lora_dropout=lora["dropout"],
        use_rslora=lora["use_rslora"],
        bias="none",
        target_modules=lora["target_modules"],
        use_gradient_checkpointing=False,
        random_state=asked["seed"],
    )
    rows = datasets.Dataset.from_parquet(
        str(Path(plan["rows"]) / "rows.parquet"), cache_dir=str(output / "rows")
    ).select_columns(["input_ids", "labels"])
    rows = rows.add_column("attention_mask", [[1] * len(ids) for ids in rows["input_ids"]])
    held_out = max(1, int(len(rows) * spec["data"]["eval_fraction"]))
    order = np.random.default_rng(asked["seed"]).permutation(len(rows))
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(output / "checkpoints"),
            num_train_epochs=asked["epochs"],
            per_device_train_batch_size=asked["micro_batch_size"],
            per_device_eval_batch_size=asked["micro_batch_size"],
            gradient_accumulation_steps=asked["gradient_accumulation"],
            learning_rate=asked["learning_rate"],
            lr_scheduler_type="cosine",
            weight_decay=asked["weight_decay"],
            max_grad_norm=asked["max_grad_norm"],
            optim="adamw_torch_fused",
            seed=asked["seed"],
            data_seed=asked["seed"],
            bf16=asked["precision"] == "bfloat16",
            use_cpu=True,
            eval_strategy="epoch",
            save_strategy="epoch",
            logging_steps=1,
            remove_unused_columns=False,
            report_to="none",
            disable_tqdm=True,
        ),
        data_collator=DataCollatorForSeq2Seq(tokenizer, padding=True, label_pad_token_id=-100),
        train_dataset=rows.select(np.sort(order[held_out:])),
        eval_dataset=rows.select(np.sort(order[:held_out])),
    )
    loaded_s = time.time()
    trainer.train()
    trained_s = time.time()
    model.save_pretrained(output / "adapter")
    tokenizer.save_pretrained(output / "adapter")
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(
        json.dumps(
            {
                "losses": [float(loss) for loss in losses],
                "load_s": loaded_s - STARTED_S,
                "train_s": trained_s - loaded_s,
                "total_s": time.time() - STARTED_S,
            }
        )
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
