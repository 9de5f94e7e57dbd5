"""What the host and the process that reads a dataset say to each other.

Imports none of what the process needs: a gateway without it has to start.
"""

from __future__ import annotations

from trainer.run_folder import Message
from trainer.spec import DataSpec

PLAN_FILE = "plan.json"
EXIT_FAILED, EXIT_STORAGE_FULL, EXIT_ORPHANED = 1, 4, 5


class PreparePlan(Message):
    """What to read, and how."""

    dataset: str
    """Path of the file."""
    model: str
    """Folder of the served model."""
    data: DataSpec
    """With every field set; `format` may be None."""
