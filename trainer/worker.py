"""The training process of one run.

    python -m trainer.worker RUN_FOLDER

Reads `plan.json`, trains, and writes `exit.json` and, last, `manifest.json`; `run_folder.py` has
the rest of the folder. Prints to the log. Exits with 0 if it trained all, 3 if it was asked to
end, 1 if it failed, 4 if a newer attempt of its job was begun, 5 if the disk was full.
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

from trainer.backends import import_backend
from trainer.devices import CPU
from trainer.event_writer import EventWriter
from trainer.failure import failure_of, is_storage_full
from trainer.fence import Fence, Fenced
from trainer.life import EXIT_FENCED, EXIT_STORAGE_FULL, Life
from trainer.run_folder import RunExit, RunFolder, RunPlan, write_whole

EXIT_OK, EXIT_FAILED, EXIT_STOPPED = 0, 1, 3
NICENESS = 5
"""On a CPU, which it shares with serving: serving comes first."""

logger = logging.getLogger(__name__)


def main(folder: Path) -> int:
    """Run what the folder's plan says; the process's exit code."""
    run = RunFolder(folder)
    plan = RunPlan.model_validate_json(run.plan.read_bytes())
    if plan.device == CPU:
        os.nice(NICENESS)
    fence = Fence(run, plan.attempt)
    with Life(run, fence, lambda: _end_while_loading(run)) as life:
        try:
            return _train(run, plan, life, fence)
        except Fenced:
            logger.exception("nothing of this attempt counts any more")
            return EXIT_FENCED
        except OSError as error:
            if not is_storage_full(error):
                raise
            logger.exception("the disk is too full to write down how the run ended")
            # The interpreter's own end would fail too, at what it has not printed yet, and make
            # another exit code of it.
            os._exit(EXIT_STORAGE_FULL)


def _train(run: RunFolder, plan: RunPlan, life: Life, fence: Fence) -> int:
    events = EventWriter(run.events)
    spec = plan.spec
    assert spec.backend is not None
    try:
        backend = import_backend(spec.backend)
        from trainer.recipe import Recipe  # it imports what the backend has to come before

        recipe = Recipe(plan, run, backend, life, fence, events)
        try:
            manifest = recipe.train()
        finally:
            spec = recipe.spec
    except Fenced:
        raise
    except Exception as error:
        life.loaded()  # one end is told: a stop that comes now is too late
        logger.exception("the run failed")
        write_whole(run.exit, RunExit(ok=False, failure=failure_of(error, spec, plan.memory_bytes)))
        return EXIT_FAILED
    finally:
        events.close()
    if manifest is None:
        write_whole(run.exit, RunExit(ok=False, stopped=True))
        return EXIT_STOPPED
    fence.check()
    write_whole(run.exit, RunExit(ok=True))
    write_whole(run.manifest, manifest)
    return EXIT_OK


def _end_while_loading(run: RunFolder) -> None:
    """Called by another thread, so that it works in the middle of an import."""
    write_whole(run.exit, RunExit(ok=False, stopped=True))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(EXIT_STOPPED)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    sys.exit(main(Path(sys.argv[1])))
