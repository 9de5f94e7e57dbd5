"""What holds for all tests."""

from __future__ import annotations

from hypothesis import settings

# How long one example takes is the machine's doing.
settings.register_profile("any machine", deadline=None)
settings.load_profile("any machine")
