"""One side of the comparison as a process of its own, asked by JSON lines over pipes.

The process runs `serve_side` with the ways that it has to open a request; its owner holds a
`Side`.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests.bench.workload import (
    Open,
    Round,
    Workload,
    run_first_tokens,
    run_round,
    run_text,
)

ONLY_WAY = ""
"""Of a process that has but one."""


class SideFailed(Exception):
    """The process ended, or could not answer; the message names its log."""


class Side:
    """The owner's end."""

    def __init__(self, module: str, arguments: list[str], log: Path) -> None:
        self._log = log
        with log.open("w") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                text=True,
            )

    def wait_ready(self) -> Any:
        """Wait until it can be asked; returns what it tells then."""
        return self._receive()

    def round(self, workload: Workload, way: str = ONLY_WAY) -> Round:
        """Run the workload for throughput."""
        return Round(**self._ask("round", workload, way))

    def first_tokens(self, workload: Workload, way: str = ONLY_WAY) -> list[float]:
        """Run the workload one request at a time; seconds to each first token."""
        answer: list[float] = self._ask("first_tokens", workload, way)
        return answer

    def text(self, workload: Workload, way: str = ONLY_WAY) -> str:
        """Run one request of the workload; its answer."""
        answer: str = self._ask("text", workload, way)
        return answer

    def close(self) -> None:
        """End the process, in order if it can."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _ask(self, what: str, workload: Workload, way: str) -> Any:
        assert self._process.stdin is not None
        question = {"what": what, "way": way, **asdict(workload)}
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        return self._receive()

    def _receive(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            raise SideFailed(f"exit code {code}:\n{self._log.read_text()[-4000:]}")
        return json.loads(line)


def take_stdout() -> Callable[[Any], None]:
    """Keep stdout for answers: whatever else prints there goes to stderr from now on."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(value: Any) -> None:
        print(json.dumps(value), file=answers, flush=True)

    return answer


async def serve_side(
    ways: Mapping[str, Open], answer: Callable[[Any], None], told: Any = None
) -> None:
    """Tell this as a sign that it is ready, then answer until the owner closes the pipe."""
    answer(told)
    while line := await asyncio.to_thread(sys.stdin.readline):
        question = json.loads(line)
        what, way, prompt = (question.pop(key) for key in ("what", "way", "prompt"))
        prompt = prompt if isinstance(prompt, str) else tuple(prompt)
        workload = Workload(prompt=prompt, **question)
        match what:
            case "round":
                answer(asdict(await run_round(workload, ways[way])))
            case "first_tokens":
                answer(await run_first_tokens(workload, ways[way]))
            case "text":
                answer(await run_text(workload, ways[way]))
