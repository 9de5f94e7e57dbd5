"""Why a run failed, told from what was raised."""

from __future__ import annotations

import errno
from collections.abc import Iterator, Mapping

from store.upload_folder import StorageFull
from trainer.events import FailureReason, JobFailure
from trainer.spec import JobSpec

MAX_LINE_CHARACTERS = 500

_FULL = (errno.ENOSPC, errno.EDQUOT)
_FULL_TEXTS = (
    "no space left on device",
    "disk quota exceeded",
    "os error 28)",
    "os error 122)",
    "pytorchstreamwriter failed writing",
    "inline_container",
    "iostream error",
)
"""What libraries make of these numbers: safetensors and PyTorch write by themselves, and PyTorch
does not say why that failed."""
_NO_MEMORY_TEXTS = (
    "out of memory",
    "defaultcpuallocator: can't allocate memory",
    "defaultcpuallocator: not enough memory",
    "cannot allocate memory",
)
_DEVICE_TEXTS = ("cuda error", "cublas_status", "cudnn_status", "cudnn error", "nvml")


class RunFailed(Exception):
    """A run cannot go on, for a reason that is known."""

    def __init__(self, failure: JobFailure) -> None:
        super().__init__(failure.message)
        self.failure = failure


def failure_of(error: BaseException, spec: JobSpec, memory_bytes: int = 0) -> JobFailure:
    """What to tell the job's owner about an error that ended a run of this spec, which might
    take so much memory; 0: not known."""
    if isinstance(error, RunFailed):
        return error.failure
    if is_storage_full(error):
        return storage_full()
    if is_out_of_memory(error):
        return out_of_memory(spec, memory_bytes)
    lines = str(error).strip().splitlines()
    text = lines[0][:MAX_LINE_CHARACTERS] if lines else "no message"
    return JobFailure(
        reason=FailureReason.TRAINER_FAILED,
        message=f"the training process failed: {type(error).__name__}: {text}; its log has more",
        metadata={"error": type(error).__name__},
        retryable=is_of_device(error),
        summary=f"failed with {type(error).__name__}",
    )


def storage_full(metadata: Mapping[str, str] | None = None) -> JobFailure:
    """The disk has no room for what the run saves."""
    return JobFailure(
        reason=FailureReason.STORAGE_FULL,
        message=(
            "the disk with the gateway's state is full: free some space (delete jobs that "
            "have ended, or lower spec.checkpoints_kept) and create the job again"
        ),
        metadata=dict(metadata or {}),
    )


def out_of_memory(spec: JobSpec, memory_bytes: int = 0) -> JobFailure:
    """The device has too little memory for this spec, of which it might take so much."""
    rows, tokens = spec.hyperparameters.micro_batch_size, spec.data.max_sequence_tokens
    within = f" in {memory_bytes / 1e9:.1f} GB" if memory_bytes else ""
    fewer = (
        "hyperparameters.micro_batch_size (and raise gradient_accumulation to keep the rows a "
        "step) or data.max_sequence_tokens"
        if rows != 1
        else "data.max_sequence_tokens"
    )
    metadata = {"micro_batch_size": str(rows), "max_sequence_tokens": str(tokens)}
    if memory_bytes:
        metadata["memory_bytes"] = str(memory_bytes)
    return JobFailure(
        reason=FailureReason.OUT_OF_MEMORY,
        message=(
            f"out of memory{within} with {rows} rows at once of up to {tokens} tokens: reduce "
            f"{fewer}"
        ),
        metadata=metadata,
    )


def is_storage_full(error: BaseException) -> bool:
    """Whether a disk or a quota was full, at this error or at one that led to it."""
    return any(
        isinstance(cause, StorageFull)
        or (isinstance(cause, OSError) and cause.errno in _FULL)
        or says_storage_full(str(cause))
        for cause in _causes(error)
    )


def says_storage_full(text: str) -> bool:
    """Whether the text of an error is that of a full disk or quota."""
    return any(sign in text.lower() for sign in _FULL_TEXTS)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device's memory was used up."""
    return any(
        isinstance(cause, MemoryError)
        or type(cause).__name__ == "OutOfMemoryError"  # PyTorch's, which is not imported for this
        or (
            isinstance(cause, RuntimeError)
            and any(text in str(cause).lower() for text in _NO_MEMORY_TEXTS)
        )
        for cause in _causes(error)
    )


def is_of_device(error: BaseException) -> bool:
    """Whether the device failed, and not what it was asked to do: a new process gets a new
    context on it, or another device."""
    return any(
        isinstance(cause, RuntimeError)  # PyTorch's AcceleratorError is one
        and any(text in str(cause).lower() for text in _DEVICE_TEXTS)
        for cause in _causes(error)
    )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__
