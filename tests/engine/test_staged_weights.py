"""The block in which an adapter's tensors lie."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
import torch

from engine.staged_weights import ALIGNMENT_BYTES, PIECE, in_one_block, read_ahead


def tasks() -> set[str]:
    """Threads of this process."""
    return set(os.listdir("/proc/self/task"))


def test_tensors_lie_in_one_block_in_the_served_type() -> None:
    generator = torch.Generator().manual_seed(1)
    shapes = {"a": (3, 5), "b": (PIECE + 7,), "c": (1, 1), "d": (2, PIECE)}
    tensors = {
        name: torch.randn(shape, generator=generator).to(torch.bfloat16)
        for name, shape in shapes.items()
    }
    base = {"model.embed_tokens.base_layer.weight": torch.ones(9, 9)}
    copies = in_one_block(tensors | base, torch.float32)
    assert copies.keys() == tensors.keys(), "vLLM skips a copy of the base's embedding"
    for name, copy in copies.items():
        assert copy.dtype == torch.float32 and torch.equal(copy, tensors[name].float())
        assert copy.data_ptr() % ALIGNMENT_BYTES == 0
    assert len({copy.untyped_storage().data_ptr() for copy in copies.values()}) == 1


def test_copies_start_no_threads_of_torch() -> None:
    """On a CPU they would compute where the engine does."""
    if torch.get_num_threads() == 1:
        pytest.skip("with one processor torch starts none anyway")
    tensor = torch.ones(2**22, dtype=torch.bfloat16)
    started = []

    def copy() -> None:
        before = tasks()
        in_one_block({"one": tensor}, torch.float32)
        started.append(tasks() - before)

    thread = threading.Thread(target=copy)
    thread.start()
    thread.join()
    assert started == [set()]


def test_a_folder_without_weights_is_not_read_ahead(tmp_path: Path) -> None:
    read_ahead(tmp_path)
    read_ahead(tmp_path / "none")
