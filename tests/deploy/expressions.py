"""Every PromQL expression that we ship, and what each asks a gateway for."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import promql_parser as grammar

from tests.deploy.rules import ROOT, alerts

DASHBOARD = ROOT / "deploy" / "grafana" / "lora-gateway.json"

VARIABLES = {
    "$__rate_interval": "5m",
    "$instance": ".*",
    "$shard": ".*",
    "$adapter": ".*",
}
"""What Grafana puts in, as a panel shows it at first."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What an expression wants of one metric."""

    metric: str
    equals: Mapping[str, str]
    """Values that labels should have."""
    labels: frozenset[str]
    """Labels that are matched or grouped by, all of which the series should have."""


def dashboard() -> dict[str, Any]:
    """The dashboard, as it is imported."""
    content: dict[str, Any] = json.loads(DASHBOARD.read_text())
    return content


def panels() -> list[dict[str, Any]]:
    """All panels that show something."""
    return [panel for panel in dashboard()["panels"] if panel["type"] != "row"]


def filled_in(expression: str) -> str:
    """An expression of a panel with its variables filled in."""
    for variable, value in VARIABLES.items():
        expression = expression.replace(variable, value)
    return expression


def expressions() -> dict[str, str]:
    """All of them, by where they are."""
    found = {f"alert {alert.name}": alert.expression for alert in alerts()}
    for panel in panels():
        for target in panel["targets"]:
            found[f"panel {panel['title']} {target['refId']}"] = filled_in(target["expr"])
    return found


def asked(expression: str) -> Iterator[Asked]:
    """All that an expression asks for. Raises ValueError if it does not parse."""
    yield from _asked(grammar.parse(expression), frozenset())


def _asked(node: Any, grouped: frozenset[str]) -> Iterator[Asked]:
    """`grouped` are the labels that aggregations around it keep."""
    match node:
        case grammar.VectorSelector():
            matchers = node.matchers.matchers
            equals = {m.name: m.value for m in matchers if m.op == grammar.MatchOp.Equal}
            labels = grouped | {matcher.name for matcher in matchers}
            yield Asked(node.name or "", equals, labels)
        case grammar.MatrixSelector():
            yield from _asked(node.vector_selector, grouped)
        case grammar.AggregateExpr():
            by = frozenset(node.modifier.labels) if node.modifier is not None else frozenset()
            yield from _asked(node.expr, by)
        case grammar.BinaryExpr():
            yield from _asked(node.lhs, grouped)
            yield from _asked(node.rhs, grouped)
        case grammar.Call():
            for argument in node.args:
                yield from _asked(argument, grouped)
        case grammar.ParenExpr():
            yield from _asked(node.expr, grouped)
        case grammar.NumberLiteral():
            pass
        case _:
            raise ValueError(node.prettify())


def kept_labels(expression: str) -> frozenset[str] | None:
    """Labels that its result has; None: those of the series."""
    return _kept(grammar.parse(expression))


def _kept(node: Any) -> frozenset[str] | None:
    match node:
        case grammar.AggregateExpr() if str(node.op) == "topk":
            return _kept(node.expr)
        case grammar.AggregateExpr():
            return frozenset(node.modifier.labels) if node.modifier is not None else frozenset()
        case grammar.Call():
            kept = _kept(node.args[-1])
            return kept - {"le"} if kept is not None else None
        case grammar.BinaryExpr():
            return _kept(node.lhs)
        case grammar.ParenExpr():
            return _kept(node.expr)
    return None
