"""An event loop whose clock jumps to the next thing that is due, and never waits.

What runs on it is decided by its own randomness alone, on a busy machine as on an idle one. Only
for what needs no threads and no sockets.
"""

from __future__ import annotations

import asyncio
import selectors


class _Clock(selectors.SelectSelector):
    """Lets time pass where others would sleep."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 1.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        assert timeout is not None, "nothing is due, and somebody waits for ever"
        self.now_s += max(0.0, timeout)
        return super().select(0)


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """For `asyncio.Runner`."""

    def __init__(self) -> None:
        self._clock = _Clock()
        super().__init__(self._clock)

    def time(self) -> float:
        return self._clock.now_s
