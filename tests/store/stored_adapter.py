"""A small adapter to be stored; the store does not look into its files."""

from __future__ import annotations

import stat
from pathlib import Path

from store.artifacts import CONFIG_FILE, WEIGHTS_FILE, Artifact, ArtifactStore


def write_source(folder: Path) -> Path:
    """The two files in a new folder."""
    folder.mkdir()
    (folder / CONFIG_FILE).write_text('{"r": 8}')
    (folder / WEIGHTS_FILE).write_bytes(b"weights" * 1000)
    return folder


def keep(store: ArtifactStore, source: Path) -> Artifact:
    with store.stage(source) as staged:
        return staged.commit()


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def staging(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "root" / "staging").iterdir())
