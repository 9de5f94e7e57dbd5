"""What holds for all tests."""

from __future__ import annotations

import pytest
from hypothesis import settings
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

# How long one example takes is the machine's doing.
settings.register_profile("any machine", deadline=None)
settings.load_profile("any machine")

END_TO_END = "tests/e2e"
ALONE = tuple(
    f"{END_TO_END}/test_{name}.py"
    for name in ("corpus", "drain", "orphans", "parity", "poison", "start_errors")
)
"""End-to-end tests that start gateways of their own."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The end-to-end tests come first: they take longest."""
    items.sort(key=lambda item: not item.nodeid.startswith(END_TO_END))


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> LoadScopeScheduling:
    """For `make test`, which runs two processes of tests: the end-to-end tests that share gateways
    go to one of them; each other file goes to whichever is free."""
    return Sharing(config, log)


class Sharing(LoadScopeScheduling):  # type: ignore[misc]  # it has no types
    """Shares out files, and the end-to-end tests that share gateways as if they were one."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return END_TO_END if file.startswith(END_TO_END) and file not in ALONE else file
