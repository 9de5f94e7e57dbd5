"""Filling a slot of the engine's batch with an adapter, a little between any two steps.

A slot is where an adapter must lie to be computed with. vLLM fills one in a single go, between two
steps or in the middle of one, while all that decodes waits. Here a slot is set aside for an adapter
that no request names yet, and filled by parts; the steps between them compute with the others. On a
GPU it is filled at once, from a spare slot where the adapter lies already.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.lora.layers import BaseLayerWithLoRA
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.model_manager import LRUCacheLoRAModelManager

    from engine.spare_slot import SpareSlot


class SlotFilling:
    """One adapter on its way into a slot. All of it runs on the thread that computes."""

    def __init__(
        self, manager: LRUCacheLoRAModelManager, model: LoRAModel, spare: SpareSlot | None = None
    ) -> None:
        """`spare` is the slot that holds it already. Sets a slot aside, that of the adapter which
        was used least recently if none is free. While requests run on all of them it takes none,
        and vLLM fills one when the adapter's first request is in the batch."""
        self._manager = manager
        self._model = model
        self._spare = spare
        self._slot = self._set_aside()
        self._left: Iterator[tuple[str, BaseLayerWithLoRA]] = iter(manager.modules.items())

    def go_on(self, budget_s: float) -> bool:
        """Fill for so long, at least one module. Whether nothing is left to be done.

        Raises what vLLM raises for weights that do not fit; `give_up` is to be called then.
        """
        end_s = time.perf_counter() + budget_s
        while self._slot is not None and self._is_ours(self._slot):
            if self._spare is not None:
                self._spare.copy_to(self._slot)
                return True
            if (module := next(self._left, None)) is None:
                return True
            self._fill(*module, self._slot)
            if time.perf_counter() >= end_s:
                return False
        return True  # a step needed the slot for another adapter

    def give_up(self) -> None:
        """Let go of the slot. What is in it is overwritten by the next that gets it."""
        if self._slot is not None and self._is_ours(self._slot):
            self._manager.deactivate_adapter(self._model.id)

    def _set_aside(self) -> int | None:
        active = self._manager._active_adapters
        if len(active) >= self._manager.lora_slots:
            oldest = next(iter(active.order))
            mapping = self._manager._last_mapping
            if mapping is not None and oldest in mapping.prompt_mapping:
                return None
            self._manager.deactivate_adapter(oldest)
        slot = self._manager.lora_index_to_id.index(None)
        # As `activate_adapter` notes it (vllm/lora/model_manager.py:340), which then finds it done.
        active[self._model.id] = None
        self._manager.lora_index_to_id[slot] = self._model.id
        return slot

    def _is_ours(self, slot: int) -> bool:
        return self._manager.lora_index_to_id[slot] == self._model.id

    def _fill(self, name: str, module: BaseLayerWithLoRA, slot: int) -> None:
        # As `activate_adapter` does with each.
        weights = self._manager._get_lora_layer_weights(self._model, name)
        if not weights:
            module.reset_lora(slot)
        else:
            module.set_lora(slot, weights.lora_a, weights.lora_b)
