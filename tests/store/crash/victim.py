"""The process that is crashed, seen from outside."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.store.crash.order import Order

ROOT = Path(__file__).parents[3]


class Victim:
    """A child with the layer loaded, from construction until `close`. One run at a time."""

    def __init__(self, layer: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.store.crash.child"],
            cwd=ROOT,
            env={"LD_PRELOAD": str(layer)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, order: Order) -> int:
        """The exit status of one run, -9 if it was killed. Raises ChildProcessError."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(asdict(order)) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise ChildProcessError(f"the child ended by itself ({self._process.wait()})")
        return int(answer)

    def close(self) -> None:
        """End the child."""
        self._process.communicate()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
