"""What README.md and docs/ say of errors, flags, files and each other is so."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic_core import PydanticUndefined

from gateway.settings import Settings
from lora_gateway.v1 import errors_pb2

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
ADRS = ROOT / "docs" / "adr"
ERRORS_PROTO = ROOT / "proto" / "lora_gateway" / "v1" / "errors.proto"
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md"))]

LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def section(title: str) -> str:
    """The README's section of that title."""
    found = re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", README.read_text(), re.M | re.S)
    assert found, f"README.md has no section {title}"
    return found[1]


def table(title: str) -> list[list[str]]:
    """Cells of the rows of the one table in a section, without its header."""
    lines = [line for line in section(title).splitlines() if line.startswith("|")]
    assert len(lines) > 2
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def code_spans(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def codes_of_reasons() -> dict[str, str]:
    """Reason to code, as errors.proto documents them."""
    comments: dict[str, str] = {}
    for comment, value in re.findall(
        r"((?:^ *//.*\n)+) *ERROR_REASON_(\w+) = \d+;", ERRORS_PROTO.read_text(), re.M
    ):
        comments[value] = re.sub(r"\s*//\s?", " ", comment)
    codes = {}
    for name in errors_pb2.ErrorReason.DESCRIPTOR.values_by_name:
        reason = name.removeprefix("ERROR_REASON_")
        if reason != "UNSPECIFIED":
            code = re.search(r"\b[Cc]ode ([A-Z_]+)\b|\bOnly in (`Job\.error`)", comments[reason])
            assert code, reason
            codes[reason] = code[1] or code[2]
    return codes


def shown(default: object) -> str:
    """A setting's default as the README writes it."""
    match default:
        case None:
            return "none"
        case dict() | list():
            return ",".join(default) or "none"
        case bool():
            return "on" if default else "off"
        case float():
            return f"{default:g}"
        case _:
            return str(default)


def defaults_of_flags() -> dict[str, str]:
    """Flag to default, of every setting."""
    flags = {}
    for name, field in Settings.model_fields.items():
        default = field.get_default(call_default_factory=True)
        assert default is not PydanticUndefined, f"{name} has no default"
        flags["--" + name.replace("_", "-")] = shown(default)
    return flags


def test_the_error_table_has_every_reason_with_its_code() -> None:
    rows = [(code_spans(reasons), code) for reasons, code, _ in table("Errors")]
    documented = [(reason, code) for reasons, code in rows for reason in reasons]
    assert dict(documented) == codes_of_reasons()
    assert len(documented) == len(codes_of_reasons()), "a reason is there twice"


def test_every_error_says_what_to_do() -> None:
    assert all(cure for _, _, cure in table("Errors"))


def test_the_flag_table_has_every_setting_with_its_default() -> None:
    documented: dict[str, str] = {}
    for flags, defaults, _ in table("Flags"):
        documented |= zip(code_spans(flags), code_spans(defaults), strict=True)
    assert documented == defaults_of_flags()


def tree_paths() -> Iterator[str]:
    """Paths of the README's tree; an indented line is in the folder above it."""
    fenced = re.search(r"^```\n(.*?)^```", section("Tree"), re.M | re.S)
    assert fenced
    folder = ""
    for line in fenced[1].splitlines():
        path = line.split()[0]
        if line.startswith(" "):
            yield folder + path
        else:
            folder = path
            yield path


def test_the_tree_shows_what_is_there() -> None:
    paths = list(tree_paths())
    assert len(paths) > 20
    assert not [path for path in paths if not (ROOT / path).exists()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_relative_links_resolve(page: Path) -> None:
    targets = [target for target in LINK.findall(page.read_text()) if "://" not in target]
    broken = []
    for target in targets:
        path, _, heading = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (heading and heading not in headings(file)):
            broken.append(target)
    assert not broken


def headings(page: Path) -> set[str]:
    """Anchors of a page's headings, as renderers of Markdown make them."""
    return {
        re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
        for title in re.findall(r"^#+ (.+)$", page.read_text(), re.M)
    }


def test_decisions_are_numbered_without_gaps_and_listed() -> None:
    pages = sorted(path for path in ADRS.glob("*.md") if path.name != "README.md")
    assert [path.name[:5] for path in pages] == [f"{n:04}-" for n in range(1, len(pages) + 1)]
    for number, page in enumerate(pages, start=1):
        assert page.read_text().startswith(f"# {number}. "), page.name
    assert LINK.findall((ADRS / "README.md").read_text()) == [page.name for page in pages]


@pytest.mark.parametrize("part", ["Status: ", "## Context", "## Decision", "## Consequences"])
def test_decisions_have_all_their_parts(part: str) -> None:
    pages = list(ADRS.glob("0*.md"))
    assert pages
    assert not [page.name for page in pages if f"\n{part}" not in page.read_text()]
