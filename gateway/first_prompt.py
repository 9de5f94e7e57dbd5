"""The first prompt of a dataset, for a look at what was learned from it.

Imported where it is used: it reads rows as the trainer does, whose imports take as long as all
others of the command.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable
from pathlib import Path

from gateway.training_options import FormatName
from lora_gateway import ChatMessage
from trainer.formats import ASSISTANT, USER, BadLine, Turn, detect, parse
from trainer.lines import read_lines
from trainer.spec import DatasetFormat


def first_prompt(file: Path, format: FormatName | None = None) -> list[ChatMessage]:
    """What precedes the first answer in a dataset, read as it is trained on; empty if no line of it
    is a row that begins with a question. Without a format: as the lines tell. Blocks on the disk.
    """
    try:
        read_as = DatasetFormat[format.name] if format else detect(read_lines(file))
        if read_as is None:
            return []
        for line in read_lines(file):
            with contextlib.suppress(BadLine):
                if prompt := _before_answer(parse(line, read_as)):
                    return prompt
    except OSError:
        pass  # it was read when it was uploaded, and may be gone by now
    return []


def _before_answer(turns: Iterable[Turn]) -> list[ChatMessage]:
    """The turns before the first of the assistant's; none unless the user has the last word."""
    asked = list(itertools.takewhile(lambda turn: turn.role != ASSISTANT, turns))
    if not asked or asked[-1].role != USER:
        return []
    return [ChatMessage(role=turn.role, content=turn.content) for turn in asked]
