"""The crash layer as a library, built where it is used."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

SOURCE = Path(__file__).with_name("layer.cpp")
BUILD_TIMEOUT_S = 60.0


class LayerUnbuildable(Exception):
    """The library cannot be built here. The message says what to do."""


def build_layer(folder: Path) -> Path:
    """Compile the library into `folder`, for LD_PRELOAD. Raises LayerUnbuildable."""
    compiler = shutil.which("g++")
    if compiler is None:
        raise LayerUnbuildable("g++ is missing, and the crash tests need it; install g++")
    library = folder / "layer.so"
    built = subprocess.run(
        [compiler, "-shared", "-fPIC", "-O1", "-std=c++17", "-o", library, SOURCE],
        capture_output=True,
        text=True,
        timeout=BUILD_TIMEOUT_S,
    )
    if built.returncode:
        raise LayerUnbuildable(f"{SOURCE.name} does not compile here; correct it:\n{built.stderr}")
    return library
