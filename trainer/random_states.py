"""All that numbers are drawn from at random, as it was at one moment."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True, slots=True)
class RandomStates:
    """What the trainer saves with a checkpoint."""

    python: Any
    numpy: Any
    cpu: torch.Tensor
    gpus: list[torch.Tensor]

    @classmethod
    def now(cls) -> RandomStates:
        """Does not wait for a device."""
        gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        return cls(random.getstate(), np.random.get_state(), torch.random.get_rng_state(), gpus)

    def restore(self) -> None:
        """Draw from now on what was drawn after that moment."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.random.set_rng_state(self.cpu)
        if self.gpus:
            torch.cuda.set_rng_state_all(self.gpus)
