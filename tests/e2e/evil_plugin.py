"""A vLLM plugin whose engine crashes on prompts that begin with an evil word.

The gateway under test finds it on its PYTHONPATH, with metadata beside it that make vLLM load it,
like any plugin of an operator's: nothing of the product knows of it. It must not import from here.
"""

from __future__ import annotations

import functools
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

RAISES = [901, 902, 901]
"""First tokens of a prompt that makes the model raise."""
DIES = [902, 901, 902]
"""First tokens of a prompt that ends the process, as broken code outside of Python does."""

METADATA = "Metadata-Version: 2.1\nName: evil-plugin\nVersion: 1.0\n"
ENTRY_POINTS = "[vllm.general_plugins]\nevil_plugin = evil_plugin:register\n"


def install(folder: Path) -> str:
    """Put it into a folder; returns the PYTHONPATH of a gateway that has it."""
    (folder / "evil_plugin.py").write_text(Path(__file__).read_text())
    info = folder / "evil_plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(METADATA)
    (info / "entry_points.txt").write_text(ENTRY_POINTS)
    found = os.environ.get("PYTHONPATH", "")
    return f"{folder}{os.pathsep}{found}" if found else str(folder)


def register() -> None:
    """What vLLM calls in each of its processes, before a core has its executor."""
    from vllm.v1.executor.multiproc_executor import MultiprocExecutor
    from vllm.v1.executor.uniproc_executor import UniProcExecutor

    for kind in (UniProcExecutor, MultiprocExecutor):
        if not hasattr(kind.execute_model, "__wrapped__"):
            kind.execute_model = evil(kind.execute_model)  # type: ignore[method-assign]


def evil(execute: Callable[..., Any]) -> Callable[..., Any]:
    """The method by which a core has its model compute a step, made to crash on evil words."""

    @functools.wraps(execute)
    def evil_execute(self: Any, scheduled: Any, *rest: Any, **others: Any) -> Any:
        for request in scheduled.scheduled_new_reqs:
            word = list(request.prompt_token_ids[:3])
            if word == RAISES:
                raise RuntimeError("an evil word")
            if word == DIES:
                os.kill(os.getpid(), signal.SIGSEGV)
        return execute(self, scheduled, *rest, **others)

    return evil_execute
