"""The flame graph that py-spy draws, read back: where the samples were."""

from __future__ import annotations

import html
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_FRAME = re.compile(
    r"<g><title>(?P<title>[^<]*)</title>"
    r'<rect [^>]*\by="(?P<y>[\d.]+)"[^>]*\bfg:x="(?P<x>\d+)" fg:w="(?P<width>\d+)"'
)
_TITLE = re.compile(r"(?P<function>.*?)(?::\d+)?(?P<closed>\)?) \([\d,]+ samples, [\d.]+%\)")


@dataclass(frozen=True, slots=True)
class Function:
    """One function of the profile."""

    name: str
    """With its file, as py-spy names it, and without the line."""
    self_samples: int
    """Samples in it, and in nothing that it called."""
    all_samples: int
    """Samples in it, or in what it called."""


@dataclass(frozen=True, slots=True)
class FlameGraph:
    """A profile, the hottest function first."""

    samples: int
    functions: Sequence[Function]

    @classmethod
    def read(cls, svg: Path) -> FlameGraph:
        """Read what `py-spy record` has written. Raises ValueError for anything else."""
        frames = [
            _Frame(_name(match["title"]), float(match["y"]), int(match["x"]), int(match["width"]))
            for match in _FRAME.finditer(svg.read_text())
        ]
        if not frames:
            raise ValueError(f"{svg} is no flame graph of py-spy")
        return _count(frames)


@dataclass(frozen=True, slots=True)
class _Frame:
    name: str
    y: float
    """The root has the smallest: py-spy draws from above."""
    x: int
    width: int
    """In samples, as x."""


def _name(title: str) -> str:
    match = _TITLE.fullmatch(html.unescape(title))
    if match is None:
        raise ValueError(f"{title!r} is no title of py-spy's")
    return match["function"] + match["closed"]


def _count(frames: Sequence[_Frame]) -> FlameGraph:
    """Each frame stands on the one whose samples hold its own, a row nearer to the root."""
    total, own = Counter[str](), Counter[str]()
    open_frames: list[_Frame] = []
    for frame in sorted(frames, key=lambda frame: (frame.x, frame.y)):
        while open_frames and open_frames[-1].x + open_frames[-1].width <= frame.x:
            open_frames.pop()
        if open_frames:
            own[open_frames[-1].name] -= frame.width
        own[frame.name] += frame.width
        if all(below.name != frame.name for below in open_frames):  # once, if it calls itself
            total[frame.name] += frame.width
        open_frames.append(frame)
    root = min(frames, key=lambda frame: frame.y)
    functions = [Function(name, own[name], total[name]) for name in total if name != root.name]
    functions.sort(key=lambda function: -function.self_samples)
    return FlameGraph(root.width, functions)
