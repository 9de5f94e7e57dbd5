"""What holds for all tests."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import settings

# How long one example takes is the machine's doing.
settings.register_profile("any machine", deadline=None)
settings.load_profile("any machine")

TESTS = Path(__file__).parent


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """For `make test`, which runs two processes of tests: the end-to-end tests share gateways, and
    all go to one of them, at once; each other file goes to whichever is free."""
    for item in items:
        folder, *rest = item.path.relative_to(TESTS).parts
        group = folder if folder == "e2e" else "/".join((folder, *rest))
        item.add_marker(pytest.mark.xdist_group(group))
    items.sort(key=lambda item: item.path.relative_to(TESTS).parts[0] != "e2e")
