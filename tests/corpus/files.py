"""Folders that hold something else than the two files, or lead elsewhere."""

from __future__ import annotations

import os
import pickle
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

from store.artifacts import CONFIG_FILE, MAX_CONFIG_BYTES, MAX_WEIGHTS_BYTES, WEIGHTS_FILE
from tests.corpus.broken import CANARY, Broken, Build, Kind, Offer, outside
from tests.corpus.draft import good_draft

SPARSE_BYTES = 50 * 1024**3


class Canary:
    """Unpickled, it leaves a file."""

    def __init__(self, folder: Path) -> None:
        self._path = str(folder / CANARY)

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (self._path,)


def changed(change: Callable[[Path], object]) -> Build:
    """A good folder, and one change to it."""

    def build(folder: Path, model: Path) -> Offer:
        good_draft(model).write(folder)
        change(folder)
        return Offer(str(folder))

    return build


def without(name: str) -> Build:
    return changed(lambda folder: (folder / name).unlink())


def instead(name: str, make: Callable[[Path], object]) -> Build:
    """Something else under the name of one of the files."""

    def change(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return changed(change)


def pickled(name: str) -> Build:
    """As PEFT saved adapters before safetensors."""

    def change(folder: Path) -> None:
        (folder / WEIGHTS_FILE).unlink()
        (folder / name).write_bytes(pickle.dumps(Canary(folder)))

    return changed(change)


def pickle_of_that_name(folder: Path) -> None:
    (folder / WEIGHTS_FILE).write_bytes(pickle.dumps(Canary(folder)))


def sparse(name: str, size_bytes: int) -> Build:
    """Takes no space, however long it is."""
    return changed(lambda folder: os.truncate(folder / name, size_bytes))


def linked(name: str, *, beyond: bool) -> Build:
    """A link to what would be a good file, beside it or where nobody may read."""

    def change(folder: Path) -> None:
        real = (outside(folder) if beyond else folder) / f"real-{name}"
        shutil.move(folder / name, real)
        (folder / name).symlink_to(real)

    return changed(change)


def linked_component(folder: Path, model: Path) -> Offer:
    """A good adapter, at the end of a path that a link leads out of the allowed place."""
    real = outside(folder) / "deep"
    real.mkdir()
    good_draft(model).write(real)
    (folder / "link").symlink_to(real.parent)
    return Offer(str(folder / "link" / "deep"))


def linked_folder(folder: Path, model: Path) -> Offer:
    real = outside(folder)
    good_draft(model).write(real)
    folder.rmdir()
    folder.symlink_to(real)
    return Offer(str(folder))


def link_to_itself(path: Path) -> None:
    path.symlink_to(path.name)


def socket(path: Path) -> None:
    os.mknod(path, stat.S_IFSOCK | 0o600)


def unreadable(folder: Path) -> None:
    (folder / WEIGHTS_FILE).chmod(0)


LINK = r"is a symbolic link; copy the file itself there"
ON_THE_WAY = r"reached through a symbolic link \(.*\), which is not followed"
IRREGULAR = "is no regular file"
PICKLE = "is a pickle and can run code"

_CASES: dict[str, tuple[Build, str]] = {
    "folder-empty": (lambda folder, model: Offer(str(folder)), f"holds no {CONFIG_FILE}"),
    "config-missing": (without(CONFIG_FILE), f"holds no {CONFIG_FILE}"),
    "weights-missing": (without(WEIGHTS_FILE), f"holds no {WEIGHTS_FILE}"),
    "pickle-bin": (pickled("adapter_model.bin"), f"adapter_model.bin, which {PICKLE}"),
    "pickle-pt": (pickled("adapter_model.pt"), f"adapter_model.pt, which {PICKLE}"),
    "pickle-named-safetensors": (
        changed(pickle_of_that_name),
        "begins with a header|is damaged or no safetensors file",
    ),
    "config-of-70-kib": (sparse(CONFIG_FILE, 70 * 1024), f"the limit is {MAX_CONFIG_BYTES}"),
    "config-of-10-mb": (sparse(CONFIG_FILE, 10_000_000), f"the limit is {MAX_CONFIG_BYTES}"),
    "weights-of-50-gib": (sparse(WEIGHTS_FILE, SPARSE_BYTES), f"limit is {MAX_WEIGHTS_BYTES}"),
    "config-linked": (linked(CONFIG_FILE, beyond=False), LINK),
    "weights-linked": (linked(WEIGHTS_FILE, beyond=False), LINK),
    "config-linked-outside": (linked(CONFIG_FILE, beyond=True), LINK),
    "weights-linked-outside": (linked(WEIGHTS_FILE, beyond=True), LINK),
    "weights-linked-to-nowhere": (
        instead(WEIGHTS_FILE, lambda path: path.symlink_to("nowhere")),
        LINK,
    ),
    "weights-linked-to-itself": (instead(WEIGHTS_FILE, link_to_itself), LINK),
    "config-linked-to-device": (
        instead(CONFIG_FILE, lambda path: path.symlink_to("/dev/zero")),
        LINK,
    ),
    "weights-linked-to-device": (
        instead(WEIGHTS_FILE, lambda path: path.symlink_to("/dev/zero")),
        LINK,
    ),
    "folder-linked-outside": (linked_folder, ON_THE_WAY),
    "folder-on-the-way-linked": (linked_component, ON_THE_WAY),
    "config-is-fifo": (instead(CONFIG_FILE, os.mkfifo), IRREGULAR),
    "weights-are-fifo": (instead(WEIGHTS_FILE, os.mkfifo), IRREGULAR),
    "config-is-folder": (instead(CONFIG_FILE, Path.mkdir), IRREGULAR),
    "weights-are-folder": (instead(WEIGHTS_FILE, Path.mkdir), IRREGULAR),
    "weights-are-socket": (instead(WEIGHTS_FILE, socket), "cannot be opened"),
}
if os.geteuid() != 0:  # who may read everything
    _CASES["weights-unreadable"] = (changed(unreadable), r"cannot be opened \(Permission denied\)")

FILES = tuple(
    Broken(name, Kind.FILES, build, expected) for name, (build, expected) in _CASES.items()
)
