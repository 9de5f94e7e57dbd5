"""Slots without end, for tests of what does not turn on them."""

from __future__ import annotations

from engine.generation import VersionKey
from engine.slot_holds import SlotHolds


def open_slots() -> SlotHolds:
    """Whoever asks for a slot has it at once."""

    async def nothing_in_core(lora_int_id: int) -> int:
        return 0

    def grant(key: VersionKey, waits: bool) -> None:
        if waits:
            slots.granted(key)

    slots = SlotHolds(grant, nothing_in_core)
    return slots
