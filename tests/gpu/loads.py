"""Loads of adapters on a host with a GPU: Llama-3.1-8B's shape, staged against vLLM's own loader.

    PYTHONPATH=.:clients/python python -m tests.gpu.loads [--rank 32] [--tiny] [...]

Makes the model and the adapters, and runs `tests/bench/loads.py` with them, and with whatever else
is given. Needs no network.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.gpu.lend import offer_plugin
from tests.gpu.measured_engine import ROOT, prepare_environment
from tests.gpu.random_adapters import write_adapters

ADAPTERS = 10
"""More than slots, so that some are in host memory only."""


def main() -> None:
    """Entry of the command."""
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.loads", description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="a try: a small model on the CPU")
    parser.add_argument("--rank", type=int, default=32, help="of the adapters, and the highest")
    parser.add_argument("--streams", type=int, default=64, help="that decode meanwhile")
    options, more = parser.parse_known_args()
    with tempfile.TemporaryDirectory(prefix="loads-") as name:
        folder = Path(name)
        offer_plugin(folder)
        prepare_environment(cpu=options.tiny)
        model = folder / "model"
        # By another process, which gives the GPU back when it ends.
        code = (
            "from pathlib import Path; from tests.gpu.random_llama import write_model; "
            f"write_model(Path({str(model)!r}), tiny={options.tiny})"
        )
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
        write_adapters(folder / "adapters", model, count=ADAPTERS, rank=options.rank)
        measure = [
            *("-m", "tests.bench.loads", "--model", f"{model}"),
            *("--adapters", f"{folder / 'adapters'}", "--rank", f"{options.rank}"),
            *("--streams", f"{options.streams}"),
        ]
        subprocess.run([sys.executable, *measure, *more], cwd=ROOT, check=True)


if __name__ == "__main__":  # the processes that write adapters import this file again
    main()
