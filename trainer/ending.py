"""How an attempt ended, as its folder proves it.

Only an exit.json that says so and an adapter that verifies are a success. What the process said
of its failure is believed; a process that said nothing is lost.
"""

from __future__ import annotations

import signal
from dataclasses import dataclass
from typing import TypeAlias

from pydantic import ValidationError

from trainer.checkpoint import CheckpointCorrupt, verified_manifest
from trainer.events import FailureReason, JobFailure, Manifest
from trainer.failure import says_storage_full, storage_full
from trainer.run_folder import RunExit, RunFolder

LOG_TAIL_BYTES = 4096
MAX_LINE_CHARACTERS = 300


@dataclass(frozen=True, slots=True)
class Finished:
    """The adapter is saved."""

    manifest: Manifest


@dataclass(frozen=True, slots=True)
class Failed:
    """The process said why."""

    failure: JobFailure


@dataclass(frozen=True, slots=True)
class Lost:
    """The process died without saying why, or what it left does not verify."""

    failure: JobFailure


Ending: TypeAlias = Finished | Failed | Lost


def ending(run: RunFolder, exit_code: int | None) -> Ending:
    """Judge an attempt whose process has ended. Blocks: it reads the adapter.

    `exit_code` is negative for a signal, and None if nobody learned it.
    """
    told = _exit(run)
    if told is None:
        return _lost(run, f"the training process {_death(exit_code)}")
    if told.ok:
        try:
            return Finished(verified_manifest(run))
        except CheckpointCorrupt as error:
            return _lost(run, f"the training process ended, but its result is damaged: {error}")
    if told.failure is not None:
        return Failed(told.failure)
    return _lost(run, "the training process was asked to end, and not by the gateway")


def said_last(run: RunFolder) -> bool:
    """Whether a process has said all that it ever will, even if it has not ended.

    To take down PyTorch takes seconds, in which nothing comes of it.
    """
    if run.manifest.exists():
        return True
    told = _exit(run)
    return told is not None and not told.ok


def _exit(run: RunFolder) -> RunExit | None:
    try:
        return RunExit.model_validate_json(run.exit.read_bytes())
    except (FileNotFoundError, ValidationError):
        return None


def _death(exit_code: int | None) -> str:
    if exit_code is None:
        return "died while the gateway was away"
    if exit_code >= 0:
        return f"ended with exit code {exit_code}"
    name = signal.Signals(-exit_code).name
    if -exit_code == signal.SIGKILL:
        return f"was killed by {name}, as the kernel does when the host's memory runs out"
    return f"was killed by {name}"


def _lost(run: RunFolder, what: str) -> Lost:
    last = last_line(run)
    if says_storage_full(last):  # too full for the process to write down why it failed
        return Lost(storage_full({"attempt": run.path.name}))
    message = f"{what}; GetJobLogs has what it printed, and CreateJob starts it again"
    if last:
        message += f". Its last line: {last}"
    return Lost(
        JobFailure(
            reason=FailureReason.TRAINER_LOST,
            message=message,
            metadata={"attempt": run.path.name},
        )
    )


def last_line(run: RunFolder) -> str:
    """The last line with text that the process printed, cut to fit into a message."""
    try:
        with run.log.open("rb") as log:
            end = log.seek(0, 2)
            log.seek(max(0, end - LOG_TAIL_BYTES))
            tail = log.read(LOG_TAIL_BYTES)
    except FileNotFoundError:
        return ""
    lines = tail.decode(errors="replace").splitlines()
    return next((line.strip() for line in reversed(lines) if line.strip()), "")[
        :MAX_LINE_CHARACTERS
    ]
