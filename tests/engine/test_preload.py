"""What a process imports before it drives an engine."""

from __future__ import annotations

import gc

from engine.shard import preload


def test_what_is_imported_is_left_out_of_collections() -> None:
    gc.unfreeze()
    try:
        preload()
        assert gc.get_freeze_count() > 100_000
    finally:
        gc.unfreeze()
