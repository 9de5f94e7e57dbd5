"""Flame graphs of py-spy are read back as it has drawn them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.bench.flame_graph import FlameGraph, Function


def frame(title: str, row: int, x: int, width: int) -> str:
    """One frame as py-spy writes it; row 0 is the root."""
    return (
        f'<g><title>{title}</title><rect x="{x}.0000%" y="{52 + 16 * row}" width="9.0000%" '
        f'height="15" fill="rgb(227,0,7)" fg:x="{x}" fg:w="{width}"/>'
        f'<text x="0.2500%" y="62.50">{title}</text></g>'
    )


def drawn(folder: Path, *frames: str) -> Path:
    svg = folder / "graph.svg"
    svg.write_text('<svg id="frames" total_samples="1200">' + "".join(frames) + "</svg>")
    return svg


def test_time_is_that_of_the_function_alone_and_with_what_it_calls(tmp_path: Path) -> None:
    graph = FlameGraph.read(
        drawn(
            tmp_path,
            # In no order: py-spy has none.
            frame("Shard.pull (engine/shard.py:7) (200 samples, 16.67%)", 2, 800, 200),
            frame("all (1,200 samples, 100%)", 0, 0, 1200),
            frame("write (gateway/wrap.py:5) (500 samples, 41.67%)", 2, 0, 500),
            frame("run (runners.py:118) (1,000 samples, 83.33%)", 1, 0, 1000),
            frame("write (gateway/wrap.py:9) (200 samples, 16.67%)", 1, 1000, 200),
        )
    )
    assert graph.samples == 1200
    assert graph.functions == [
        Function("write (gateway/wrap.py)", 700, 700),
        Function("run (runners.py)", 300, 1000),
        Function("Shard.pull (engine/shard.py)", 200, 200),
    ]


def test_a_function_that_calls_itself_is_there_once(tmp_path: Path) -> None:
    graph = FlameGraph.read(
        drawn(
            tmp_path,
            frame("all (10 samples, 100%)", 0, 0, 10),
            frame("walk (a.py:1) (10 samples, 100.00%)", 1, 0, 10),
            frame("walk (a.py:3) (4 samples, 40.00%)", 2, 2, 4),
        )
    )
    assert graph.functions == [Function("walk (a.py)", 10, 10)]


@pytest.mark.parametrize(
    ("title", "name"),
    [
        ("&lt;lambda&gt; (vllm/envs.py:3)", "<lambda> (vllm/envs.py)"),
        ("sendmsg (libc.so.6)", "sendmsg (libc.so.6)"),
        ("0x7fbc01a67739 (cygrpc.so)", "0x7fbc01a67739 (cygrpc.so)"),
        ("&lt;module&gt; (&lt;string&gt;:6)", "<module> (<string>)"),
    ],
)
def test_functions_have_their_names_without_lines(title: str, name: str, tmp_path: Path) -> None:
    graph = FlameGraph.read(
        drawn(
            tmp_path,
            frame("all (3 samples, 100%)", 0, 0, 3),
            frame(f"{title} (3 samples, 100.00%)", 1, 0, 3),
        )
    )
    assert graph.functions == [Function(name, 3, 3)]


def test_another_picture_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no flame graph"):
        FlameGraph.read(drawn(tmp_path))
