"""A checkpoint whose files are those that the training process wrote."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from store.artifacts import WEIGHTS_FILE
from trainer.checkpoint import CheckpointCorrupt, verify
from trainer.run_folder import MANIFEST_FILE, RunFolder

logger = logging.getLogger(__name__)

ADVICE = "publish another checkpoint of the job, or train again"


class CheckpointUnusable(Exception):
    """Files of a checkpoint are gone or damaged. The message says what to do."""


@dataclass(frozen=True, slots=True)
class VerifiedCheckpoint:
    """One checkpoint."""

    path: Path
    sha256: str
    """Of its manifest, lower-case hex."""
    weights_sha256: str
    """Of the adapter's weights, as the manifest has it."""
    fingerprints: Mapping[str, str]
    """Of the base model that it was trained on, by the contract's field names."""


def open_checkpoint(path: Path) -> VerifiedCheckpoint:
    """Read and hash all that the manifest lists. Raises CheckpointUnusable."""
    try:
        manifest = verify(path)
        content = (path / MANIFEST_FILE).read_bytes()
        # Not the whole RunPlan: an older release may have written other fields.
        plan = json.loads(RunFolder(path.parents[1]).plan.read_bytes())
        return VerifiedCheckpoint(
            path=path,
            sha256=hashlib.sha256(content).hexdigest(),
            weights_sha256=manifest.adapter_files[WEIGHTS_FILE],
            fingerprints=plan["fingerprints"],
        )
    except CheckpointCorrupt as error:
        raise CheckpointUnusable(f"{error}: {ADVICE}") from error
    except (OSError, ValueError, LookupError) as error:
        logger.error("%s: %s", path, error)
        raise CheckpointUnusable(f"files that belong to {path.name} are gone: {ADVICE}") from error
