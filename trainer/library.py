"""The seam to the catalog: the adapters that jobs may train further, which only the gateway has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True, slots=True)
class LibraryVersion:
    """A version of an adapter that is READY."""

    version: int
    config: Path
    """Its `adapter_config.json`."""
    weights: Path
    weights_sha256: str
    fingerprints: Mapping[str, str]
    """Of the base model, as far as whoever made the version told them."""


class Library(Protocol):
    """All adapters of one gateway."""

    @property
    def modules(self) -> Mapping[str, tuple[int, int]]:
        """The base model's linear layers, rows and columns by dotted name."""

    async def version(self, tenant: str, adapter: str, version: int | None) -> LibraryVersion:
        """A version; None: the one with the most traffic.

        Raises what callers are answered with who ask for one that is not there, not READY, or
        damaged.
        """
