"""Alert rules as files have them, and what they do over scripted series, step by step."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import promql_parser as grammar
import yaml

from tests.deploy.promql import Labels, Series, evaluate, labels_of

ROOT = Path(__file__).parents[2]
ALERTS = ROOT / "deploy" / "prometheus" / "alerts.yaml"
CASES = Path(__file__).parent / "alerts_test.yaml"

_REPEATED = re.compile(r"(_|stale|-?[\d.]+)(?:([+-][\d.]+))?(?:x(\d+))?")


@dataclass(frozen=True, slots=True)
class Alert:
    """One rule."""

    name: str
    expression: str
    for_s: float
    labels: Mapping[str, str]
    annotations: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Check:
    """What should fire at one time of a case."""

    query: str
    time_s: float
    fires: frozenset[Labels]


@dataclass(frozen=True, slots=True)
class Case:
    """Scripted series, and what should come of them."""

    number: int
    series: Sequence[Series]
    checks: Sequence[Check]


def alerts() -> list[Alert]:
    """All rules that we ship."""
    groups: list[dict[str, Any]] = yaml.safe_load(ALERTS.read_text())["groups"]
    return [
        Alert(
            name=rule["alert"],
            expression=rule["expr"],
            for_s=_seconds(rule.get("for", "0s")),
            labels=rule["labels"],
            annotations=rule["annotations"],
        )
        for group in groups
        for rule in group["rules"]
    ]


def cases() -> tuple[float, list[Case]]:
    """Seconds between two evaluations, and all cases."""
    # All are strings: YAML would take `0x20`, twenty zeros, for a hexadecimal number.
    content: dict[str, Any] = yaml.load(CASES.read_text(), yaml.BaseLoader)
    found = [
        Case(
            number=number,
            series=[_series(line, _seconds(case["interval"])) for line in case["input_series"]],
            checks=[_check(check) for check in case["promql_expr_test"]],
        )
        for number, case in enumerate(content["tests"])
    ]
    return _seconds(content["evaluation_interval"]), found


def firing(case: Case, until_s: float, step_s: float) -> set[Labels]:
    """The alerts that fire at that time, as the series ALERTS shows them."""
    found: set[Labels] = set()
    for alert in alerts():
        since_s: dict[Labels, float] = {}
        time_s = 0.0
        while time_s <= until_s:
            active = evaluate(alert.expression, case.series, time_s)
            since_s = {labels: since_s.get(labels, time_s) for labels in active}
            time_s += step_s
        at_s = time_s - step_s
        for labels, begin_s in since_s.items():
            if at_s - begin_s >= alert.for_s:
                shown = dict(labels) | dict(alert.labels)
                shown |= {"__name__": "ALERTS", "alertname": alert.name, "alertstate": "firing"}
                found.add(frozenset(shown.items()))
    return found


def _check(check: dict[str, Any]) -> Check:
    samples = check.get("exp_samples", [])
    assert all(sample["value"] == "1" for sample in samples)
    return Check(
        check["expr"],
        _seconds(check["eval_time"]),
        frozenset(labels_of(sample["labels"]) for sample in samples),
    )


def _series(line: dict[str, Any], interval_s: float) -> Series:
    values = enumerate(_values(line["values"]))
    samples = [(number * interval_s, value) for number, value in values if value is not None]
    return Series(labels_of(line["series"]), samples)


def _values(notation: str) -> Iterator[float | None]:
    """As promtool reads them: `a+bxn` are a and n more, each b above the last; `_` is none."""
    for word in notation.split():
        found = _REPEATED.fullmatch(word)
        assert found, word
        begin, step, times = found.groups()
        if begin == "_":
            yield from [None] * int(times or 1)
            continue
        for number in range(int(times or 0) + 1):
            yield float(begin) + number * float(step or 0)


def _seconds(duration: str) -> float:
    if duration in ("0s", "0m"):
        return 0.0  # which the parser takes for a mistake
    return grammar.parse_duration(duration).total_seconds()
