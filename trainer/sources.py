"""Where an interpreter finds this package, also if it is not installed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path


def with_our_sources(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment in which an interpreter finds this package."""
    sources = Path(__file__).parents[1]
    if sources.name == "site-packages":  # as installed as it can be, beside much else
        return dict(environment)
    others = [environment["PYTHONPATH"]] if environment.get("PYTHONPATH") else []
    return {**environment, "PYTHONPATH": ":".join([str(sources), *others])}
