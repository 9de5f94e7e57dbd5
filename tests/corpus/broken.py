"""What a broken adapter is: how it is built, how it is offered, and why it is refused."""

from __future__ import annotations

import contextlib
import enum
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lora_gateway.v1 import adapters_pb2 as ad
from tests.corpus.draft import Spoil, good_draft

CANARY = "it-ran"
"""File in a case's folder that only code out of its pickle makes."""
MEDDLING_INTERVAL_S = 0.0005
"""Between two changes of files while they are copied: often, but others need the processor."""


class Kind(enum.Enum):
    """What is wrong."""

    CONFIG = enum.auto()
    """What adapter_config.json holds."""
    TENSORS = enum.auto()
    """Names, shapes, types and values of the tensors."""
    WEIGHTS = enum.auto()
    """The safetensors file around them."""
    FILES = enum.auto()
    """What lies in the folder instead of the two files."""
    PLACE = enum.auto()
    """Where the source URI leads."""
    CLAIM = enum.auto()
    """What the caller says of the adapter."""
    CHANGE = enum.auto()
    """Files that change while they are copied."""
    UPLOAD = enum.auto()
    """The stream that an upload came in."""
    ANSWERS = enum.auto()
    """What it makes an engine answer: no check of the files can tell."""


@dataclass(frozen=True, slots=True)
class Offer:
    """An adapter at a source: what ValidateAdapter and CreateAdapterVersion are asked."""

    source_uri: str
    expected_sha256: str = ""
    fingerprints: Mapping[str, str] = field(default_factory=dict)
    """By field names of ModelFingerprints."""
    meddle: Callable[[], object] | None = None
    """Changes the files once; called over and over while the adapter is taken in."""


@dataclass(frozen=True, slots=True)
class Upload:
    """An adapter in a stream: what UploadAdapterVersion is sent."""

    requests: Sequence[ad.UploadAdapterVersionRequest]


Build = Callable[[Path, Path], Offer | Upload]
"""Builds a case in `folder`, for the base model in `model`. The folder exists and is empty; its
parent is the only place that the gateway may read, apart from what `outside` gives."""


@dataclass(frozen=True, slots=True)
class Broken:
    """An adapter that must be refused."""

    name: str
    """Also of its folder and its adapter."""
    kind: Kind
    build: Build
    expected: str
    """Regular expression that one of the findings matches, or else the message."""
    reason: str = "ADAPTER_INVALID"
    """Of errors.proto, in what creating it answers."""
    findings: int = 1
    """How many there are: what is wrong once is said once."""


def spoiled(
    kind: Kind, cases: Mapping[str, tuple[Spoil, str]], *, findings: int = 1
) -> tuple[Broken, ...]:
    """Cases that are a good adapter, spoiled and written: by name the spoil and `expected`."""

    def case(name: str, spoil: Spoil, expected: str) -> Broken:
        def build(folder: Path, model: Path) -> Offer:
            draft = good_draft(model)
            spoil(draft)
            draft.write(folder)
            return Offer(str(folder))

        return Broken(name, kind, build, expected, findings=findings)

    return tuple(case(name, *rest) for name, rest in cases.items())


def outside(folder: Path) -> Path:
    """A folder for the case where the gateway may not read. It exists and is empty."""
    beyond = folder.parent.parent / "outside" / folder.name
    beyond.mkdir(parents=True)
    return beyond


@contextlib.contextmanager
def meddling(offer: Offer) -> Iterator[None]:
    """Change the files of an offer over and over, until the end of the block."""
    meddle = offer.meddle
    if meddle is None:
        yield
        return
    over = threading.Event()
    changed = threading.Event()
    errors: list[BaseException] = []

    def run() -> None:
        try:
            while not over.wait(MEDDLING_INTERVAL_S):
                meddle()
                changed.set()
        except BaseException as error:
            errors.append(error)
            changed.set()

    thread = threading.Thread(target=run, name="meddler")
    thread.start()
    try:
        changed.wait()
        yield
    finally:
        over.set()
        thread.join()
    if errors:
        raise errors[0]
