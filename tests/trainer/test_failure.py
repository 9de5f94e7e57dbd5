from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch

from tests.trainer.training_run import resolved
from trainer.events import FailureReason
from trainer.failure import failure_of


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), FailureReason.STORAGE_FULL),
        (OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)), FailureReason.STORAGE_FULL),
        (OSError(errno.EIO, os.strerror(errno.EIO)), FailureReason.TRAINER_FAILED),
        (torch.OutOfMemoryError("CUDA out of memory."), FailureReason.OUT_OF_MEMORY),
        (MemoryError(), FailureReason.OUT_OF_MEMORY),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9 bytes"),
            FailureReason.OUT_OF_MEMORY,
        ),
        (
            # As safetensors says it.
            RuntimeError("Error: I/O error: No space left on device (os error 28)"),
            FailureReason.STORAGE_FULL,
        ),
        (RuntimeError("shapes differ"), FailureReason.TRAINER_FAILED),
        (RuntimeError(), FailureReason.TRAINER_FAILED),
    ],
)
def test_errors_have_reasons(error: Exception, reason: FailureReason) -> None:
    failure = failure_of(error, resolved({}))
    assert failure.reason is reason
    assert "\n" not in failure.message


def test_pytorch_on_a_full_disk_is_known(tmp_path: Path) -> None:
    full = tmp_path / "full"
    # Never the device itself: a library that renames over it would take it from the machine.
    full.symlink_to("/dev/full")
    with pytest.raises(RuntimeError) as caught:
        torch.save({"a": torch.zeros(100_000)}, full)
    assert failure_of(caught.value, resolved({})).reason is FailureReason.STORAGE_FULL


def test_a_real_failed_allocation_is_known() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**55, dtype=torch.uint8)
    assert failure_of(caught.value, resolved({})).reason is FailureReason.OUT_OF_MEMORY


def test_a_cause_counts_and_the_first_line_is_told() -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    outer = RuntimeError("could not save\nbecause of much")
    outer.__cause__ = full
    assert failure_of(outer, resolved({})).reason is FailureReason.STORAGE_FULL
    outer.__cause__ = None
    assert "RuntimeError: could not save; its log" in failure_of(outer, resolved({})).message


def test_pitfalls_out_of_memory_says_what_to_reduce_and_the_numbers() -> None:
    spec = resolved({"hyperparameters": {"micro_batch_size": 6}})
    tried = {"micro_batch_size": "6", "max_sequence_tokens": "512"}
    assert failure_of(MemoryError(), spec).metadata == tried
    failure = failure_of(MemoryError(), spec, 12_300_000_000)
    assert failure.metadata == {**tried, "memory_bytes": "12300000000"}
    assert failure.message.startswith(
        "out of memory in 12.3 GB with 6 rows at once of up to 512 tokens: reduce "
        "hyperparameters.micro_batch_size"
    )
    assert failure.message.endswith("or data.max_sequence_tokens")


def test_pitfalls_fewer_than_one_row_at_once_are_not_advised() -> None:
    failure = failure_of(MemoryError(), resolved({"hyperparameters": {"micro_batch_size": 1}}))
    assert failure.message.endswith("tokens: reduce data.max_sequence_tokens")
