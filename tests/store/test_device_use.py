"""What is forgotten of the use of devices."""

from __future__ import annotations

import pytest

from store.device_use import HALF_LIFE_S, DeviceUse, held_s

HALF_LIFE_NS = round(HALF_LIFE_S * 1e9)


def test_a_long_run_counts_no_more_than_what_is_remembered() -> None:
    assert held_s(0, 60 * 10**9) == pytest.approx(60, rel=0.01)
    assert held_s(0, 400 * HALF_LIFE_NS) == pytest.approx(HALF_LIFE_S * 1.4427, rel=1e-3)
    # In parts as in one: what is held through counts as what was given back and taken again.
    parts = DeviceUse("acme", 0).returned(0, HALF_LIFE_NS)
    parts = parts.returned(HALF_LIFE_NS, 3 * HALF_LIFE_NS)
    assert parts.used_s == pytest.approx(held_s(0, 3 * HALF_LIFE_NS))
