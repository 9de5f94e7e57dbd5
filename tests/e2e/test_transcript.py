"""The shell transcript of docs/adapters.md, run as a reader would, against the real gateway.

Its `sh` blocks go to one shell, in order. The `text` block after one is what it must print, where
`...` in a line stands for anything in that line, and alone for any lines.
"""

from __future__ import annotations

import difflib
import os
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.e2e.gateway_process import GatewayProcess, gateway_process

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "adapters.md"
HEADING = "## From canary to rollback\n"
DOCUMENTED_ADDRESS = "127.0.0.1:50051"

BLOCK = re.compile(r"^```(sh|text)\n(.*?)^```$", re.M | re.S)
END_OF_STEP = "\0"
"""Printed after each step. No answer has one."""
SHELL_TIMEOUT_S = 240.0


@dataclass(frozen=True, slots=True)
class Step:
    """One `sh` block, and what it prints."""

    commands: str
    output: str
    """Empty if the page shows none."""


def steps(page: str) -> Iterator[Step]:
    """The steps of the transcript on a page."""
    _, found, transcript = page.partition(HEADING)
    assert found, f"there is no {HEADING!r}"
    commands = ""
    for kind, content in BLOCK.findall(transcript):
        if kind == "sh":
            if commands:
                yield Step(commands, "")
            commands = content
        else:
            assert commands, f"an output without its commands:\n{content}"
            yield Step(commands, content)
            commands = ""
    if commands:
        yield Step(commands, "")


def pattern(shown: str) -> re.Pattern[str]:
    """What an output must match in whole, where it is shown as this. Both `plain`."""
    lines = []
    for line in shown.splitlines(keepends=True):
        if line.strip() == "...":
            lines.append("(?:.*\n)*?")
        else:
            lines.append(".*?".join(map(re.escape, line.split("..."))))
    return re.compile("".join(lines))


def plain(text: str) -> str:
    """Without the space that protobuf's JSON puts here or there, different in each build."""
    return "".join(" ".join(line.split()) + "\n" for line in text.splitlines())


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayProcess]:
    """What the page says to start, which is `make serve`, with a new state folder."""
    with gateway_process(
        tmp_path_factory.mktemp("transcript"),
        model="smollm2-135m",
        adapters={"pirate": ROOT / "examples" / "adapters" / "pirate"},
        extra=[f"--adapter-source-allow={ROOT / 'examples'}"],
    ) as process:
        yield process


# Most of it is the start of a real model, which is converted first.
@pytest.mark.slow
@pytest.mark.timeout(480)
def test_the_transcript_prints_what_it_shows(gateway: GatewayProcess) -> None:
    todo = list(steps(PAGE.read_text()))
    script = "set -euo pipefail\n" + "".join(
        f"{step.commands.replace(DOCUMENTED_ADDRESS, gateway.address)}\nprintf '\\0'\n"
        for step in todo
    )
    assert script.count(gateway.address) == 1
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=ROOT,
        env={**os.environ, "PWD": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=SHELL_TIMEOUT_S,
    )
    printed = done.stdout.split(END_OF_STEP)
    assert done.returncode == 0, (
        f"step {len(printed)} failed:\n{todo[len(printed) - 1].commands}{done.stderr}"
    )
    for step, output in zip(todo, printed, strict=False):
        if step.output:
            shown, got = plain(step.output), plain(output)
            difference = "\n".join(difflib.ndiff(shown.splitlines(), got.splitlines()))
            assert pattern(shown).fullmatch(got), f"{step.commands}prints:\n{difference}"
        else:
            assert not output, f"{step.commands}prints what the page does not show:\n{output}"


def test_what_is_shown_must_match_in_whole() -> None:
    shown = pattern('{\n"a": "...",\n...\n"c": ...\n}\n')
    assert shown.fullmatch('{\n"a": "1",\n"c": 3\n}\n')
    assert shown.fullmatch('{\n"a": "1",\n"b": [\n2\n],\n"c": 3\n}\n')
    assert not shown.fullmatch('{\n"a": 1,\n"c": 3\n}\n')
    assert not shown.fullmatch('{\n"a": "1",\n"b": 2\n}\n')
    assert not shown.fullmatch('{\n"a": "1",\n"c": 3\n}\n{\n}\n')


def test_blocks_are_paired_and_kept_in_order() -> None:
    page = f"```sh\nbefore\n```\n{HEADING}```sh\na\n```\n```sh\nb\n```\nx\n```text\nB\n```\n"
    assert list(steps(page)) == [Step("a\n", ""), Step("b\n", "B\n")]
