"""The rules of the house that no linter knows: short files, names that say something, locks."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
GENERATED = ROOT / "clients" / "python" / "lora_gateway" / "v1"
FOLDERS = ("clients", "deploy", "engine", "examples", "gateway", "store", "tests", "trainer")

MOST_LINES = 400

SAYS_NOTHING = {"common", "helper", "helpers", "manager", "managers", "misc", "util", "utils"}

REQUIREMENTS = ROOT / "requirements"
CPU, CUDA, DEV = "cpu.txt", "cuda.txt", "dev.txt"


def python_files() -> list[Path]:
    files = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
    return [path for path in files if GENERATED not in path.parents]


def pins(lock: str) -> dict[str, str]:
    text = (REQUIREMENTS / lock).read_text()
    return dict(re.findall(r"^([a-z0-9-]+)==(\S+)$", text, re.MULTILINE))


def test_no_file_is_longer_than_a_sitting() -> None:
    lines = {path: path.read_text().count("\n") for path in python_files()}
    assert lines
    assert not {str(path): count for path, count in lines.items() if count > MOST_LINES}


def test_no_module_has_a_name_that_says_nothing() -> None:
    paths = [path.relative_to(ROOT).with_suffix("") for path in python_files()]
    names = {part for path in paths for part in path.parts}
    assert not {name for name in names if SAYS_NOTHING & set(name.lower().split("_"))}


def test_no_event_loop_starts_a_process() -> None:
    """uvloop would fork beside gRPC, and some of the children crash (trainer/child.py)."""
    ours = [path for path in python_files() if "tests" not in path.parts]
    assert ours
    assert not [str(path) for path in ours if "create_subprocess_" in path.read_text()]


def test_locks_pin_every_line_and_name_no_index() -> None:
    for lock in (CPU, CUDA, DEV, "proto.txt", "uv.txt"):
        lines = (REQUIREMENTS / lock).read_text().splitlines()
        loose = [
            line
            for line in lines
            if not re.fullmatch(r"[a-z0-9-]+==[^\s@/]+|\s*#(?!.*://).*", line)
        ]
        assert lines
        assert not loose, lock


def test_the_dev_lock_goes_on_top_of_both_server_locks() -> None:
    dev = pins(DEV)
    assert not dev.keys() & pins(CPU).keys(), "dev.txt holds only what cpu.txt lacks"
    cuda = pins(CUDA)
    assert not {name: (dev[name], cuda[name]) for name in dev.keys() & cuda.keys()}


def test_the_cpu_lock_holds_the_cpu_build_of_torch_and_nothing_that_links_to_another() -> None:
    cpu = pins(CPU)
    assert cpu["torch"] == "2.13.0+cpu"
    assert not cpu.keys() & {"torchaudio", "torchcodec", "torchvision", "xformers"}
    assert not [name for name in cpu if name.startswith("nvidia-")]
