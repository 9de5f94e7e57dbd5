"""State folders as a gateway finds them at its start: with no adapter, and with very many.

The many are written through the registry, in the two transactions that a version takes on its
way to READY, and share the files of a few real adapters.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from engine.models import resolve_model
from gateway.call import Principal
from store.artifacts import ArtifactStore
from store.records import Content, NewVersion
from store.sqlite_registry import SqliteRegistry
from store.state_folder import StateFolder
from tests.tiny_adapter import MODULES, write_tiny_adapter

REGISTRY_FILE = "registry.sqlite"
"""Below the state folder; `gateway/host.py` names it."""
TENANT = Principal().tenant
ARTIFACTS = 4
RANK = 8
ACTOR = "bench"


@dataclass(frozen=True, slots=True)
class States:
    """Two state folders that differ in their adapters alone."""

    empty: Path
    full: Path


def adapter_name(number: int) -> str:
    """Name of one of the many."""
    return f"bench-{number:06}"


async def write_states(folder: Path, model: str, adapters: int) -> States:
    """Make both below `folder`; in the full one each adapter has one version, READY and with
    all traffic."""
    states = States(folder / "empty", folder / "full")
    for path in (states.empty, states.full):
        with StateFolder(path) as state:
            model_path = resolve_model(model, state.path)
            async with SqliteRegistry(state.path / REGISTRY_FILE) as registry:
                if path == states.full:
                    contents = _keep_artifacts(state.path, model_path, folder / "sources")
                    await _register(registry, contents, adapters)
    return states


def _keep_artifacts(state_dir: Path, model_path: Path, sources: Path) -> list[Content]:
    store = ArtifactStore(state_dir)
    contents = []
    for seed in range(ARTIFACTS):
        source = write_tiny_adapter(sources / str(seed), model_path, seed=seed, rank=RANK)
        with store.stage(source) as staged:
            artifact = staged.commit()
        contents.append(
            Content(
                digest=artifact.digest,
                weights_sha256=artifact.weights_sha256,
                size_bytes=artifact.size_bytes,
                rank=RANK,
                target_modules=tuple(sorted(MODULES)),
            )
        )
    return contents


async def _register(registry: SqliteRegistry, contents: list[Content], adapters: int) -> None:
    for number in range(adapters):
        name = adapter_name(number)
        new = NewVersion(TENANT, name, f"file:///srv/adapters/{name}")
        record = await registry.begin_version(new, request_id="", actor=ACTOR)
        content = contents[number % len(contents)]
        await registry.complete_version(TENANT, name, record.version, content, actor=ACTOR)
