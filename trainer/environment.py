"""The environment of a training process, in one place."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase

from trainer.devices import CPU
from trainer.run_folder import RunFolder

SECRETS = (
    "AWS_*",
    "AZURE_*",
    "GOOGLE_*",
    "GATEWAY_*",
    "*_KEY",
    "*_KEY_ID",
    "*_PASSWORD*",
    "*_SECRET*",
    "*_TOKEN",
)
"""Names of what a process does not need that reads files alone, and must not tell."""
OFFLINE = {
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    # Else Unsloth counts its users with a download.
    "UNSLOTH_DISABLE_STATISTICS": "1",
}
BESIDE_OTHERS = {
    # Threads of one operation that wait for each other in a loop keep a core from whom they wait
    # for. With more busy threads than cores, a step of a second then takes a minute.
    "OMP_WAIT_POLICY": "PASSIVE",
}
"""On a CPU, which a training process shares with the engine."""
QUIET = {
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TQDM_DISABLE": "1",
}


def without_secrets(base: Mapping[str, str]) -> dict[str, str]:
    """An environment without what its names say is secret, and without the gateway's settings."""
    return {
        name: value
        for name, value in base.items()
        if not any(fnmatchcase(name.upper(), pattern) for pattern in SECRETS)
    }


def training_environment(
    base: Mapping[str, str], run: RunFolder, device: str = CPU
) -> dict[str, str]:
    """What a training process gets; `device` is `cpu` or the number of a GPU."""
    environment = without_secrets(base)
    return {
        **environment,
        **(BESIDE_OTHERS if device == CPU else {}),
        # An empty value hides every GPU: a run on the CPU must not even open a context on one.
        "CUDA_VISIBLE_DEVICES": "" if device == CPU else device,
        # Numbers as the driver counts them, not by speed.
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        # Micro-batches differ in length: without it the allocator's leftovers add up.
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
        "PYTHONUNBUFFERED": "1",
        # Unsloth writes source code; runs side by side must not write the same files.
        "UNSLOTH_COMPILE_LOCATION": str(run.path / "unsloth_compiled"),
        **OFFLINE,
        **QUIET,
    }
