"""Lines are found where they are, and no line is too much for the memory."""

from __future__ import annotations

import codecs
import tracemalloc
from pathlib import Path

import pytest

from trainer.lines import MAX_LINE_BYTES, line_at, read_lines


def written(folder: Path, data: bytes) -> Path:
    path = folder / "data.jsonl"
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    ("data", "lines"),
    [
        (b"", []),
        (b"a", [b"a"]),
        (b"a\n", [b"a"]),
        (b"a\nb", [b"a", b"b"]),
        (b"a\r\nb\r\n", [b"a", b"b"]),
        (b"a\n\nb\n", [b"a", b"", b"b"]),
        (b"a\n\n", [b"a", b""]),
        (b"a\n \t", [b"a"]),
        (b"\n", [b""]),
        (b" \r", []),
        (b"a\rb\n", [b"a\rb"]),
        (codecs.BOM_UTF8 + b"a\nb", [b"a", b"b"]),
        (codecs.BOM_UTF8, []),
        (b"a\n" + codecs.BOM_UTF8 + b"b", [b"a", codecs.BOM_UTF8 + b"b"]),
        (b"\xef\xbb", [b"\xef\xbb"]),
    ],
)
def test_lines_are_read_as_editors_write_them(
    tmp_path: Path, data: bytes, lines: list[bytes]
) -> None:
    path = written(tmp_path, data)
    assert list(read_lines(path)) == lines
    assert [line_at(path, number) for number in range(1, len(lines) + 1)] == lines
    with pytest.raises(LookupError):
        line_at(path, len(lines) + 1)


@pytest.mark.parametrize("ending", [b"\n", b"\r\n", b""])
@pytest.mark.parametrize("over", [-1, 0, 1, 2, 3])
def test_a_line_may_have_16_mib_and_no_byte_more(tmp_path: Path, ending: bytes, over: int) -> None:
    long = b"x" * (MAX_LINE_BYTES + over)
    path = written(tmp_path, b"a\n" + long + ending + (b"b" if ending else b""))
    first, second, *rest = read_lines(path)
    assert (first, second) == (b"a", long if over <= 0 else None)
    assert rest == ([b"b"] if ending else [])
    assert line_at(path, 2) == second


def test_a_line_that_is_too_long_is_skipped_and_not_held(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    with path.open("wb") as file:  # sparse: it takes no disk
        file.write(b"a\n")
        file.seek(16 * MAX_LINE_BYTES)
        file.write(b"\nb\n")
    tracemalloc.start()
    try:
        assert list(read_lines(path)) == [b"a", None, b"b"]
        assert tracemalloc.get_traced_memory()[1] < 4 * MAX_LINE_BYTES
    finally:
        tracemalloc.stop()


def test_a_line_is_found_far_down_a_file(tmp_path: Path) -> None:
    path = written(tmp_path, b"".join(b"%d\n" % number for number in range(1, 400_001)))
    for number in (1, 2, 150_000, 399_999, 400_000):
        assert line_at(path, number) == b"%d" % number
    with pytest.raises(LookupError):
        line_at(path, 400_001)
