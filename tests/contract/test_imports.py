"""Imports go one way, and what a package may not know it does not import.

    lora_gateway <- gateway -> {engine, trainer} -> store

Every import counts: at the top, inside a function, under TYPE_CHECKING.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

FOLDERS = {
    "lora_gateway": ROOT / "clients" / "python" / "lora_gateway",
    "gateway": ROOT / "gateway",
    "engine": ROOT / "engine",
    "trainer": ROOT / "trainer",
    "store": ROOT / "store",
}

ARROWS = {
    "lora_gateway": set[str](),
    "gateway": {"lora_gateway", "engine", "trainer", "store"},
    "engine": {"store"},
    "trainer": {"store"},
    "store": set[str](),
}

RPC = {"grpc", "grpc_health", "grpc_reflection", "grpc_status", "google"}

UNKNOWN_TO = {
    "gateway": {"vllm", "torch", "transformers"},
    "engine": RPC,
    "trainer": RPC | {"vllm"},
    "store": RPC | {"vllm", "torch", "transformers"},
}

MEET_IN = {
    "gateway/control.py",
    "gateway/training_plane.py",
    "gateway/publishing.py",
    "gateway/gating.py",
    "gateway/preview.py",
    "gateway/catalog_library.py",
}
"""The composition roots, and the four places where training asks the engine (ADR 0008)."""
ERRORS = {"engine.errors", "trainer.errors"}
"""What goes wrong is told by one table, and bad fields are told by one type."""

READS_THE_ENVIRONMENT = {"gateway/settings.py"}


def sources(package: str) -> Iterator[tuple[str, ast.Module]]:
    """Each file of a package: its path in the repository and its syntax tree."""
    for path in sorted(FOLDERS[package].rglob("*.py")):
        yield path.relative_to(ROOT).as_posix(), ast.parse(path.read_bytes(), str(path))


def imported(tree: ast.Module, package: str) -> Iterator[tuple[int, str]]:
    """Line and top-level package of each import."""
    for line, name in modules(tree, package):
        yield line, name.partition(".")[0]


def modules(tree: ast.Module, package: str) -> Iterator[tuple[int, str]]:
    """Line and module of each import."""
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                for alias in names:
                    yield node.lineno, alias.name
            case ast.ImportFrom(level=0, module=str(module)):
                yield node.lineno, module
            case ast.ImportFrom():
                yield node.lineno, package
            case ast.Call(
                func=ast.Attribute(attr="import_module")
                | ast.Name(id="import_module" | "__import__"),
                args=[ast.Constant(value=str(module)), *_],
            ):
                yield node.lineno, module


@pytest.mark.parametrize("package", ARROWS)
def test_a_package_imports_only_where_its_arrows_point(package: str) -> None:
    forbidden = (ARROWS.keys() - ARROWS[package] - {package}) | {"tests"}
    wrong = [
        f"{path}:{line} imports {name}"
        for path, tree in sources(package)
        for line, name in imported(tree, package)
        if name in forbidden
    ]
    assert not wrong


@pytest.mark.parametrize("package", UNKNOWN_TO)
def test_a_package_does_not_import_what_it_may_not_know(package: str) -> None:
    wrong = [
        f"{path}:{line} imports {name}"
        for path, tree in sources(package)
        for line, name in imported(tree, package)
        if name in UNKNOWN_TO[package]
    ]
    assert not wrong


def test_engine_and_trainer_meet_in_few_places() -> None:
    both = {
        path
        for path, tree in sources("gateway")
        if {"engine", "trainer"}
        <= {name.partition(".")[0] for _, name in modules(tree, "gateway") if name not in ERRORS}
    }
    assert both == MEET_IN


def test_the_environment_is_touched_in_one_file() -> None:
    names = {"environ", "environb", "getenv", "getenvb", "putenv", "unsetenv"}
    wrong = []
    for package in FOLDERS:
        for path, tree in sources(package):
            for node in ast.walk(tree):
                match node:
                    case ast.Attribute(value=ast.Name(id="os"), attr=name) if name in names:
                        wrong.append(f"{path}:{node.lineno} uses os.{name}")
                    case ast.ImportFrom(module="os", names=aliases):
                        wrong += [
                            f"{path}:{node.lineno} imports os.{alias.name}"
                            for alias in aliases
                            if alias.name in names
                        ]
    assert not [line for line in wrong if line.partition(":")[0] not in READS_THE_ENVIRONMENT]


def test_the_walk_sees_every_kind_of_import() -> None:
    tree = ast.parse(
        "import a.b, c\n"
        "from d.e import f\n"
        "from . import g\n"
        "if TYPE_CHECKING:\n    import h\n"
        "def lazily():\n    from i import j\n"
        "importlib.import_module('k.l')\n"
    )
    assert {name for _, name in imported(tree, "own")} == {"a", "c", "d", "own", "h", "i", "k"}
