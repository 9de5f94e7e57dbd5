"""`gateway serve`: the composition root, from flags to an exit code."""

from __future__ import annotations

import contextlib
import sqlite3
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from gateway.log_lines import configure_logging
from gateway.run_dir import run_dir
from gateway.settings import (
    Settings,
    SettingsError,
    prepare_environment,
    training_environment_base,
)


def main(argv: Sequence[str]) -> int:
    """Serve until a signal; returns the exit code. What is wrong is one line on stderr."""
    try:
        settings = Settings.from_argv(argv)
    except SettingsError as error:
        return _refuse(error)
    with contextlib.ExitStack() as owned:
        # Not in the state folder: the path of a socket must be short, and its folder ours alone.
        try:
            folder = owned.enter_context(run_dir())
        except OSError as error:
            return _refuse(error)
        # The sockets by which `multiprocessing` hands descriptors on are to go with it as well.
        tempfile.tempdir = str(folder)
        # prometheus_client and vLLM read the environment when they are imported, so
        # everything below is imported only now.
        found = prepare_environment(settings, folder)
        configure_logging()
        return _run(settings, folder, training_environment_base(settings, found))


def _run(settings: Settings, run_dir: Path, training_environment: Mapping[str, str]) -> int:
    import uvloop

    from engine.errors import EngineError
    from gateway.host import Host
    from gateway.port import PortTaken
    from gateway.workers import WorkerFailed
    from store.artifacts import ArtifactDamaged
    from store.records import RegistryUnusable
    from store.state_folder import StateFolderUnusable
    from store.upload_folder import StorageFull

    async def run() -> int:
        return await Host(settings, run_dir, training_environment).run()

    try:
        return uvloop.run(run())
    except (EngineError, PortTaken, WorkerFailed) as error:
        return _refuse(error)
    except (StateFolderUnusable, RegistryUnusable, ArtifactDamaged) as error:
        return _refuse(error)
    except (OSError, sqlite3.Error, StorageFull) as error:  # a full disk, most likely
        return _refuse(error)


def _refuse(error: Exception) -> int:
    print(f"gateway serve: {error}", file=sys.stderr, flush=True)
    return 1
