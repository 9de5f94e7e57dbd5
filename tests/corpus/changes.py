"""Sources that change while they are copied.

What is copied may come from before, after or between, so each case is broken at every moment:
by its values where the files are whole, and by a good adapter where nobody may read, which
would be served if a link to it were ever followed.
"""

from __future__ import annotations

import itertools
import math
import os
import shutil
from pathlib import Path

from store.artifacts import WEIGHTS_FILE
from tests.corpus.broken import Broken, Kind, Offer, outside
from tests.corpus.draft import Q_PROJ, Draft, a, good_draft

MOST_BYTES = 8 * 1024**2
"""That the growing file grows to before it begins anew."""
BLOCK_BYTES = 64 * 1024


def diverged(model: Path) -> Draft:
    draft = good_draft(model)
    draft.tensors[a(Q_PROJ)][0, 0] = math.nan
    return draft


def link_swapped_in(folder: Path, model: Path) -> Offer:
    """The weights are now a file, now a link, each put in place by one rename."""
    good_draft(model).write(beyond := outside(folder))
    diverged(model).write(folder)
    weights, other = folder / WEIGHTS_FILE, folder / "other"
    content = weights.read_bytes()
    is_link = itertools.cycle([True, False])

    def meddle() -> None:
        if next(is_link):
            other.symlink_to(beyond / WEIGHTS_FILE)
        else:
            other.write_bytes(content)
        other.rename(weights)

    return Offer(str(folder), meddle=meddle)


def folder_swapped_out(folder: Path, model: Path) -> Offer:
    """A folder on the way is now itself, now a link to another one."""
    good_draft(model).write(beyond := outside(folder))
    inner, aside, link = folder / "inner", folder / "aside", folder / "link"
    inner.mkdir()
    diverged(model).write(inner)
    link.symlink_to(beyond)
    is_link = itertools.cycle([True, False])

    def meddle() -> None:
        if next(is_link):
            inner.rename(aside)
            link.rename(inner)
        else:
            inner.rename(link)
            aside.rename(inner)

    return Offer(str(inner), meddle=meddle)


def growing(folder: Path, model: Path) -> Offer:
    good_draft(model).write(folder)
    weights = folder / WEIGHTS_FILE
    size_bytes = weights.stat().st_size

    def meddle() -> None:
        with weights.open("ab") as file:
            file.write(b"\0" * 4096)
            if file.tell() > MOST_BYTES:
                os.truncate(weights, size_bytes + 1)  # never the good file

    return Offer(str(folder), meddle=meddle)


def deleted(folder: Path, model: Path) -> Offer:
    """The whole folder goes, file by file, and comes again at once."""
    diverged(model).write(folder)
    again = folder.with_name(f"{folder.name}-again")
    shutil.copytree(folder, keep := folder.with_name(f"{folder.name}-keep"))
    exists = itertools.cycle([False, True])

    def meddle() -> None:
        if next(exists):
            shutil.copytree(keep, again)
            again.rename(folder)
        else:
            shutil.rmtree(folder)

    return Offer(str(folder), meddle=meddle)


def rewritten(folder: Path, model: Path) -> Offer:
    """Another training writes to the same place: as long a file, and half of it another."""
    diverged(model).write(folder)
    weights = folder / WEIGHTS_FILE
    begin = weights.stat().st_size // 2
    blocks = itertools.cycle([bytes(BLOCK_BYTES), weights.read_bytes()[begin:][:BLOCK_BYTES]])

    def meddle() -> None:
        with weights.open("r+b") as file:
            file.seek(begin)
            file.write(next(blocks))

    return Offer(str(folder), meddle=meddle)


DIVERGED = "hold NaN or infinity"
CUT = "changed while it was copied|is damaged or no safetensors file"

CHANGES = tuple(
    Broken(name, Kind.CHANGE, build, expected)
    for name, build, expected in (
        ("link-swapped-in", link_swapped_in, f"{DIVERGED}|is a symbolic link"),
        (
            "folder-swapped-out",
            folder_swapped_out,
            f"{DIVERGED}|reached through a symbolic link|does not exist",
        ),
        ("weights-growing", growing, CUT),
        (
            "source-deleted",
            deleted,
            f"{DIVERGED}|does not exist|holds no adapter_",
        ),
        ("weights-rewritten", rewritten, DIVERGED),
    )
)
