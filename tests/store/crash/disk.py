"""A disk that may lose what was not synced: replays a journal, and tells what a power cut leaves.

The rules are those of POSIX, not of a kind file system. What was written to a file is safe once
that file was synced; that the file has its name is safe once the folder with the name was
synced, and a rename once the folder that it ended in was. A rename is seen whole or not at all;
but if only the folder that it left was synced, then the file may have no name.
"""

from __future__ import annotations

import enum
import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from tests.store.crash.journal import Entry, Op

SECTOR_BYTES = 512
"""A disk writes these whole."""

Image = Mapping[str, bytes | None]
"""What lies below a folder: the content of files, None for folders, by relative path."""


class Survival(enum.Enum):
    """What a power cut leaves of that which was not synced."""

    NOTHING = "nothing"
    PREFIX = "prefix"
    """Of each file the first writes, the last of them torn at a sector."""
    SCATTERED = "scattered"
    """Any of the writes, in whatever order the disk came to them."""
    EVERYTHING = "everything"


@dataclass(eq=False, slots=True)
class _File:
    synced: bytes = b""
    unsynced: list[Entry] = field(default_factory=list)

    def sync(self) -> None:
        self.synced = _apply(self.synced, self.unsynced)
        self.unsynced = []


@dataclass(eq=False, slots=True)
class _Folder:
    """Its names are in `Disk._changes`: which of them it has depends on what survives."""


@dataclass(eq=False, slots=True)
class _Change:
    """Of names: `node` gets a name in `folder`, or that name goes (None)."""

    folder: _Folder
    name: str
    node: _File | _Folder | None
    moved_from: tuple[_Folder, str] | None = None
    synced: bool = False
    left_is_synced: bool = False
    """Of the folder that it was moved from."""

    def sync(self, folder: _File | _Folder) -> None:
        self.synced |= self.folder is folder
        self.left_is_synced |= self.moved_from is not None and self.moved_from[0] is folder


_Names = dict[_Folder, dict[str, _File | _Folder]]


class Disk:
    """One folder, to which a journal's entries are applied one by one.

    It holds `before` at first, and that is synced.
    """

    def __init__(self, before: Image) -> None:
        self._root = _Folder()
        self._changes: list[_Change] = []
        self._names: _Names = {self._root: {}}
        for path, content in before.items():
            self._change(path, _Folder() if content is None else _File(content))
        for change in self._changes:
            change.synced = True

    def apply(self, entry: Entry) -> None:
        """Do what the call did. Raises KeyError if the journal lacks what made the file."""
        match entry.op:
            case Op.NOTE:
                pass
            case Op.CREATE:
                self._change(entry.path, _File())
            case Op.MKDIR:
                self._change(entry.path, _Folder())
            case Op.UNLINK | Op.RMDIR:
                self._change(entry.path, None)
            case Op.RENAME:
                self._change(entry.data.decode(), self._find(entry.path), self._place(entry.path))
            case Op.WRITE | Op.TRUNCATE:
                file = self._find(entry.path)
                assert isinstance(file, _File)
                file.unsynced.append(entry)
            case Op.SYNC:
                node = self._find(entry.path)
                if isinstance(node, _File):
                    node.sync()
                for change in self._changes:
                    change.sync(node)

    def cut(self, survival: Survival, seed: int) -> Image:
        """What is left if the power goes now; equal seeds draw equally."""
        draw = random.Random(seed)
        names: _Names = {self._root: {}}
        for change in self._surviving(survival, draw):
            _rename(names, change)
        return dict(_walk(names, self._root, PurePosixPath(), survival, draw))

    def _surviving(self, survival: Survival, draw: random.Random) -> Iterator[_Change]:
        lost: set[_Folder] = set()
        for change in self._changes:
            if not change.synced and survival is not Survival.EVERYTHING:
                # Without order between folders, but with it in each: a journal's of names.
                if survival is Survival.NOTHING or draw.random() < 0.5:
                    lost.add(change.folder)
                if change.folder in lost:
                    if change.moved_from is not None and change.left_is_synced:
                        yield _Change(*change.moved_from, None)
                    continue
            yield change

    def _change(
        self,
        path: str,
        node: _File | _Folder | None,
        moved_from: tuple[_Folder, str] | None = None,
    ) -> None:
        folder, name = self._place(path)
        change = _Change(folder, name, node, moved_from)
        self._changes.append(change)
        _rename(self._names, change)

    def _place(self, path: str) -> tuple[_Folder, str]:
        parent, _, name = path.rpartition("/")
        folder = self._find(parent)
        assert isinstance(folder, _Folder)
        return folder, name

    def _find(self, path: str) -> _File | _Folder:
        node: _File | _Folder = self._root
        for part in PurePosixPath(path).parts:
            assert isinstance(node, _Folder)
            node = self._names[node][part]
        return node


def read_image(folder: Path) -> Image:
    """What lies below a folder now, without what SQLite makes anew at recovery."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
        if not path.name.endswith("-shm")
    }


def write_image(image: Image, folder: Path) -> None:
    """Make the folder, and in it what the image holds."""
    folder.mkdir(parents=True)
    for name, content in image.items():
        if content is None:
            (folder / name).mkdir()
        else:
            (folder / name).write_bytes(content)


def _rename(names: _Names, change: _Change) -> None:
    if change.moved_from is not None:
        folder, name = change.moved_from
        if names.setdefault(folder, {}).get(name) is change.node:
            del names[folder][name]
    entries = names.setdefault(change.folder, {})
    if change.node is None:
        entries.pop(change.name, None)
    else:
        entries[change.name] = change.node
        if isinstance(change.node, _Folder):
            names.setdefault(change.node, {})


def _walk(
    names: _Names, folder: _Folder, path: PurePosixPath, survival: Survival, draw: random.Random
) -> Iterator[tuple[str, bytes | None]]:
    for name, node in sorted(names[folder].items(), key=lambda item: item[0]):
        if isinstance(node, _Folder):
            yield str(path / name), None
            yield from _walk(names, node, path / name, survival, draw)
        else:
            yield str(path / name), _apply(node.synced, _written(node.unsynced, survival, draw))


def _written(writes: list[Entry], survival: Survival, draw: random.Random) -> Iterator[Entry]:
    match survival:
        case Survival.NOTHING:
            return
        case Survival.EVERYTHING:
            yield from writes
        case Survival.SCATTERED:
            yield from (write for write in writes if draw.random() < 0.5)
        case Survival.PREFIX:
            number = draw.randint(0, len(writes))
            yield from writes[:number]
            if number < len(writes) and writes[number].op is Op.WRITE:
                yield _torn(writes[number], draw)


def _torn(write: Entry, draw: random.Random) -> Entry:
    """The part of a write that lies before a sector's border, not all of it."""
    end = write.offset + len(write.data)
    borders = range(-(-write.offset // SECTOR_BYTES) * SECTOR_BYTES, end, SECTOR_BYTES)
    border = draw.choice([write.offset, *(at for at in borders if at >= write.offset)])
    return Entry(
        write.call, write.op, write.path, write.offset, write.data[: border - write.offset]
    )


def _apply(content: bytes, writes: Iterable[Entry]) -> bytes:
    file = bytearray(content)
    for write in writes:
        if write.op is Op.TRUNCATE:
            del file[write.offset :]
            file.extend(bytes(write.offset - len(file)))
        elif write.data:
            file.extend(bytes(max(0, write.offset - len(file))))
            file[write.offset : write.offset + len(write.data)] = write.data
    return bytes(file)
