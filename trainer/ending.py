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
from trainer.life import EXIT_STORAGE_FULL
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


@dataclass(frozen=True, slots=True)
class Stopped:
    """The process ended because it was asked to."""

    failure: JobFailure
    """What its owner is told if that was not us."""


Ending: TypeAlias = Finished | Failed | Lost | Stopped


def ending(run: RunFolder, exit_code: int | None) -> Ending:
    """Judge an attempt whose process has ended. Blocks: it reads the adapter.

    `exit_code` is negative for a signal, and None if nobody learned it.
    """
    if exit_code == EXIT_STORAGE_FULL:
        return Failed(storage_full({"attempt": run.path.name}))
    told = _exit(run)
    if told is None:
        return lost(run, *_death(exit_code))
    if told.ok:
        try:
            return Finished(verified_manifest(run))
        except CheckpointCorrupt as error:
            return lost(run, f"ended, but its result is damaged: {error}")
    if told.failure is not None:
        return Failed(told.failure)
    return Stopped(lost(run, "was asked to end, and not by the gateway").failure)


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


def _death(exit_code: int | None) -> tuple[str, str]:
    """What became of a process that said nothing, and what is to be known of that."""
    if exit_code is None:
        return "died while the gateway was away", ""
    if exit_code >= 0:
        return f"ended with exit code {exit_code}", ""
    name = signal.Signals(-exit_code).name
    if -exit_code == signal.SIGKILL:
        return f"was killed by {name}", ", as the kernel does when the host's memory runs out"
    return f"was killed by {name}", ""


def lost(run: RunFolder, what: str, more: str = "") -> Lost:
    """The end of a process that proves no success; `what` became of it, in words that follow
    its name, and `more` explains. Blocks."""
    last = last_line(run)
    if says_storage_full(last):  # too full for the process to write down why it failed
        return Lost(storage_full({"attempt": run.path.name}))
    message = f"the training process {what}{more}; GetJobLogs has what it printed"
    if last:
        message += f". Its last line: {last}"
    return Lost(
        JobFailure(
            reason=FailureReason.TRAINER_LOST,
            message=message,
            metadata={"attempt": run.path.name},
            retryable=True,
            summary=what,
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
