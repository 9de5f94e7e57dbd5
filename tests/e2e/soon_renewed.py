"""`gateway` as it is, but for how many client slots are few: one worker that dies is enough.

Else some fifty workers would have to die, one after the other, before a core is renewed.
"""

from __future__ import annotations

from typing import Any

from gateway import serve
from gateway.cli import app

LOW_SLOTS = 60
"""With two workers a new core has 61 left."""

_run = serve._run


def _run_with_few(*arguments: Any) -> int:
    from gateway import renewal  # not before the environment is prepared

    renewal.LOW_SLOTS = LOW_SLOTS
    return _run(*arguments)


if __name__ == "__main__":
    serve._run = _run_with_few  # type: ignore[assignment]  # it takes the same
    app()
