"""From a line of a dataset to its row: what reading and previewing have in common."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from trainer.chat_tokenizer import ChatTokenizer
from trainer.formats import REQUIRED, BadLine, Turn, detect, parse
from trainer.lines import read_lines
from trainer.masks import Masks
from trainer.overlength import Fit, Overlength
from trainer.spec import DatasetFormat, DataSpec

_MESSAGE = re.compile(r"messages\[(\d+)\](\.\w+)?")

_FIELDS: Mapping[DatasetFormat, tuple[str, ...]] = {
    format: names for format, names in REQUIRED.items() if format is not DatasetFormat.CHAT
}
"""Where the text of each turn comes from, in formats without messages."""


class DatasetRows:
    """Makes rows of lines of one format. Not for several threads at once."""

    def __init__(self, chat: ChatTokenizer, data: DataSpec, format: DatasetFormat | None) -> None:
        """`data` has every field set but its format; `format` None: no line told."""
        assert data.loss_mask is not None
        self._format = format
        self.masks = Masks(chat, data.loss_mask)
        self.overlength = Overlength(self.masks, data)

    def parse(self, line: bytes | None) -> list[Turn]:
        """The turns of a line. Raises BadLine."""
        return parse(line, self._format)

    def fit(self, line: bytes | None) -> Fit:
        """What becomes of a line. Raises BadLine."""
        turns = self.parse(line)
        try:
            return self.overlength.fit(turns)
        except BadLine as error:
            raise BadLine(error.code, self._field(error.field), error.message) from error

    def _field(self, field: str) -> str:
        """The field of the line that a message was made from."""
        names = _FIELDS.get(self._format) if self._format else None
        found = _MESSAGE.fullmatch(field)
        return field if names is None or found is None else names[int(found[1])]


def format_of(path: Path, data: DataSpec) -> DatasetFormat | None:
    """How the lines of a file are to be read; None: it was not said, and no line tells.

    Raises OSError.
    """
    return data.format or detect(read_lines(path))
