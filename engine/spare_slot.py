"""A slot beside those of the batch, on the GPU, which a thread fills while the engine computes.

vLLM fills a slot by some 900 small operations for an 8B model, 10 ms of Python between two steps.
Here a thread does these on a slot that no step reads, on a stream of its own; what is left to be
done between two steps is one copy within the GPU.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.model_manager import LRUCacheLoRAModelManager

STACKED = ("lora_a_stacked", "lora_b_stacked")
"""Where vLLM's layers keep their slots; the first dimension is the slot."""


class SpareSlot:
    """As much memory as one slot of each layer has."""

    def __init__(self, manager: LRUCacheLoRAModelManager) -> None:
        """Raises torch.OutOfMemoryError."""
        self._manager = manager
        self._stream = torch.cuda.Stream(manager.device) if manager.device.type == "cuda" else None
        self._done: torch.cuda.Event | None = None
        """What the stream that goes next has to wait for."""
        with self._after_the_last(self._stream):  # made on another stream, it might be zeroed late
            self._shadows = {name: _shadow(module) for name, module in manager.modules.items()}
        self._slots = [each for module in manager.modules.values() for each in _stacked(module)]
        self._spares = [each[0] for shadow in self._shadows.values() for each in _stacked(shadow)]
        self.holds: int | None = None
        """Id of the adapter that is in it, or on its way there."""

    def fill(self, model: LoRAModel) -> None:
        """Put an adapter in, by vLLM's own code for each layer; it is there when this returns.
        Called by the thread that reads.

        Raises what vLLM raises for weights that do not fit.
        """
        with self._after_the_last(self._stream):
            for name, shadow in self._shadows.items():
                weights = self._manager._get_lora_layer_weights(model, name)
                if not weights:
                    shadow.reset_lora(0)
                else:
                    shadow.set_lora(0, weights.lora_a, weights.lora_b)
        if self._done is not None:
            self._done.synchronize()  # else the next step would wait for it

    def copy_to(self, slot: int) -> None:
        """Copy what is in it to a slot of the batch, before the next step. Called by the thread
        that computes."""
        stream = torch.cuda.current_stream() if self._stream is not None else None
        with self._after_the_last(stream):
            torch._foreach_copy_([each[slot] for each in self._slots], self._spares)

    @contextlib.contextmanager
    def _after_the_last(self, stream: torch.cuda.Stream | None) -> Iterator[None]:
        """Work of this stream, which begins on the GPU after what was done here before."""
        if stream is None:
            yield
            return
        with torch.cuda.stream(stream):
            if self._done is not None:
                stream.wait_event(self._done)
            yield
            self._done = stream.record_event()


def fits(manager: LRUCacheLoRAModelManager) -> bool:
    """Whether all layers keep their slots as is known here; those of experts do not."""
    kept = [all(hasattr(module, name) for name in STACKED) for module in manager.modules.values()]
    return not manager._is_moe and all(kept)


def _shadow(module: Any) -> Any:
    """The same layer, with one slot of its own."""
    shadow = copy.copy(module)
    for name in STACKED:
        slots = getattr(module, name)
        if isinstance(slots, tuple):
            own: Any = tuple(torch.zeros_like(each[:1]) for each in slots)
        else:
            own = torch.zeros_like(slots[:1])
        object.__setattr__(shadow, name, own)
    return shadow


def _stacked(module: Any) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    for name in STACKED:
        slots = getattr(module, name)
        found.extend(slots if isinstance(slots, tuple) else [slots])
    return found
