"""What an import costs: copy, check and commit of an adapter against cp, sync and sha256sum.

Makes a valid adapter of 168 MB: rank 32 on all linear modules of an 8B Llama, in bfloat16. Both
sides do the same work in turns, on the same disk and with the source in the page cache, and each
round writes new files. The exit code is 0 whenever it could measure: a missed target is printed
as missed.

Some builds of sha256sum do without the processor's SHA instructions, which hashlib has. So the
ratio is given a second time, with hashlib in the place of sha256sum.

    python -m tests.bench.imports
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from engine.adapters import check_adapter
from engine.base_model import ModuleShapes
from store.artifacts import CONFIG_FILE, WEIGHTS_FILE, ArtifactStore

LAYERS, HIDDEN, KEY_VALUE, FEED_FORWARD = 32, 4096, 1024, 14336
"""Of Llama 3 8B."""
SHAPES: ModuleShapes = {
    f"model.layers.{layer}.{module}": shape
    for layer in range(LAYERS)
    for module, shape in {
        "self_attn.q_proj": (HIDDEN, HIDDEN),
        "self_attn.k_proj": (KEY_VALUE, HIDDEN),
        "self_attn.v_proj": (KEY_VALUE, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HIDDEN),
        "mlp.gate_proj": (FEED_FORWARD, HIDDEN),
        "mlp.up_proj": (FEED_FORWARD, HIDDEN),
        "mlp.down_proj": (HIDDEN, FEED_FORWARD),
    }.items()
}
RANK = 32
TARGET_RATIO = 2.0
TOOLS = ("cp", "sync", "sha256sum")
STEPS = ("stage", "check", "commit")


def main() -> None:
    """Entry of the command."""
    options = _options()
    with tempfile.TemporaryDirectory(prefix="bench-imports-", dir=options.folder) as folder:
        _measure(Path(folder), options.rounds)


def _measure(folder: Path, rounds: int) -> None:
    source = folder / "source"
    _write_adapter(source)
    _import(source, folder / "state")  # imports torch and vLLM, and warms the page cache
    tools, hashes, imports = [], [], []
    for _ in range(rounds):
        tools.append(_run_tools(source / WEIGHTS_FILE, folder / "copy"))
        hashes.append(_hash(source / WEIGHTS_FILE))
        imports.append(_import(source, folder / "state"))
    size_bytes = (source / WEIGHTS_FILE).stat().st_size
    print(f"import of {size_bytes / 1e6:.0f} MB, {rounds} rounds in turns, medians in ms")
    _print_steps(TOOLS, tools)
    _print_steps(STEPS, imports)
    import_s = statistics.median(map(sum, imports))
    ratio = import_s / statistics.median(map(sum, tools))
    verdict = "met" if ratio <= TARGET_RATIO else "MISSED"
    print(f"ratio {ratio:.2f}; target at most {TARGET_RATIO}: {verdict}")
    with_hashlib_s = [sum(steps[:2]) + hash_s for steps, hash_s in zip(tools, hashes, strict=True)]
    print(f"ratio {import_s / statistics.median(with_hashlib_s):.2f} with hashlib for sha256sum")


def _print_steps(names: Sequence[str], rounds_s: Sequence[Sequence[float]]) -> None:
    for name, times_s in zip(names, zip(*rounds_s, strict=True), strict=True):
        print(f"  {name:<12}{statistics.median(times_s) * 1e3:8.0f}")
    print(f"  {'together':<12}{statistics.median(map(sum, rounds_s)) * 1e3:8.0f}")


def _run_tools(weights: Path, copy: Path) -> list[float]:
    """Seconds of each of TOOLS."""
    elapsed_s = []
    for command in (("cp", str(weights), str(copy)), ("sync", str(copy)), ("sha256sum", str(copy))):
        begin_s = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        elapsed_s.append(time.perf_counter() - begin_s)
    copy.unlink()
    return elapsed_s


def _import(source: Path, root: Path) -> list[float]:
    """Seconds of each of STEPS."""
    store = ArtifactStore(root)
    times_s = [time.perf_counter()]
    with store.stage(source) as staged:
        times_s.append(time.perf_counter())
        check_adapter(staged.path, adapter="bench", shapes=SHAPES, max_lora_rank=RANK)
        times_s.append(time.perf_counter())
        artifact = staged.commit()
    times_s.append(time.perf_counter())
    store.remove(artifact.digest)
    shutil.rmtree(root)
    return [end_s - begin_s for begin_s, end_s in itertools.pairwise(times_s)]


def _hash(path: Path) -> float:
    begin_s = time.perf_counter()
    with path.open("rb", buffering=0) as file:
        hashlib.file_digest(file, "sha256")
    return time.perf_counter() - begin_s


def _write_adapter(folder: Path) -> None:
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for module, (out_features, in_features) in SHAPES.items():
        for side, shape in (("lora_A", (RANK, in_features)), ("lora_B", (out_features, RANK))):
            values = torch.randn(shape, generator=generator) * 0.01
            tensors[f"base_model.model.{module}.{side}.weight"] = values.to(torch.bfloat16)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": RANK,
        "lora_alpha": 2 * RANK,
        "target_modules": sorted({module.rpartition(".")[2] for module in SHAPES}),
        "bias": "none",
    }
    folder.mkdir()
    save_file(tensors, folder / WEIGHTS_FILE)
    (folder / CONFIG_FILE).write_text(json.dumps(config))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.imports", description=__doc__)
    parser.add_argument("--rounds", type=int, default=7, help="of both sides, at least 5")
    parser.add_argument("--folder", type=Path, help="on the disk to be measured; default: /tmp")
    return parser.parse_args()


if __name__ == "__main__":
    main()
