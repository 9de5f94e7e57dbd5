"""Each alert fires when it should and not otherwise, and tells what to do."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.deploy.promql import Series, evaluate, labels_of
from tests.deploy.rules import ALERTS, CASES, ROOT, Alert, Case, alerts, cases, firing

PROMTOOL = shutil.which("promtool")
STEP_S, ALL_CASES = cases()
OPERATIONS = (ROOT / "docs" / "operations.md").read_text()


def first_words(case: Case) -> str:
    """What the file says of a case."""
    comments = re.findall(r"^  - interval: \w+ # (.*)$", CASES.read_text(), re.M)
    return str(comments[case.number])


@pytest.mark.parametrize("case", ALL_CASES, ids=first_words)
def test_what_fires_is_what_should(case: Case) -> None:
    for check in case.checks:
        wanted = labels_of(check.query)
        fired = {labels for labels in firing(case, check.time_s, STEP_S) if wanted <= labels}
        assert fired == check.fires, f"after {check.time_s:g} s"


def test_every_alert_is_seen_to_fire() -> None:
    fired = {
        dict(labels)["alertname"] for case in ALL_CASES for c in case.checks for labels in c.fires
    }
    assert fired == {alert.name for alert in alerts()}


@pytest.mark.parametrize("alert", alerts(), ids=lambda alert: alert.name)
def test_an_alert_says_what_is_wrong_and_what_to_do(alert: Alert) -> None:
    assert alert.labels.keys() == {"severity"}
    assert alert.labels["severity"] in {"critical", "warning", "info"}
    assert alert.annotations.keys() == {"summary", "action", "runbook"}
    assert alert.annotations["action"].endswith(".")
    assert alert.annotations["runbook"] == f"docs/operations.md#{alert.name.lower()}"
    assert f"\n### {alert.name}\n" in OPERATIONS


@pytest.mark.parametrize("alert", alerts(), ids=lambda alert: alert.name)
def test_an_alert_names_only_labels_that_it_has(alert: Alert) -> None:
    named = set(re.findall(r"\$labels\.(\w+)", " ".join(alert.annotations.values())))
    has = [
        {name for name, _ in labels}
        for case in ALL_CASES
        for check in case.checks
        for labels in check.fires
        if ("alertname", alert.name) in labels
    ]
    assert all(named <= labels for labels in has), named


def test_there_is_no_section_without_its_alert() -> None:
    section = OPERATIONS.split("\n## Alerts\n")[1].split("\n## ")[0]
    assert set(re.findall(r"^### (\w+)$", section, re.M)) == {alert.name for alert in alerts()}


def test_prometheus_is_told_of_the_rules_and_asks_the_default_address() -> None:
    config = yaml.safe_load(ALERTS.with_name("prometheus.yml").read_text())
    assert config["rule_files"] == [ALERTS.name]
    (job,) = config["scrape_configs"]
    assert job["job_name"] == "lora-gateway", "GatewayDown asks for it"
    assert job["static_configs"] == [{"targets": ["127.0.0.1:9464"]}]


@pytest.mark.skipif(PROMTOOL is None, reason="promtool is not installed")
@pytest.mark.parametrize(
    "arguments",
    [
        ("check", "config", str(ALERTS.with_name("prometheus.yml"))),
        ("check", "rules", str(ALERTS)),
        ("test", "rules", str(CASES)),
    ],
    ids=" ".join,
)
def test_promtool_is_content(arguments: tuple[str, ...]) -> None:
    assert PROMTOOL is not None
    done = subprocess.run(
        [PROMTOOL, *arguments], capture_output=True, text=True, timeout=60, cwd=Path(ROOT)
    )
    assert done.returncode == 0, done.stdout + done.stderr


# --- the arithmetic itself ---------------------------------------------------


def counter(*values: float, every_s: float = 30.0, **labels: str) -> Series:
    samples = [(number * every_s, value) for number, value in enumerate(values)]
    return Series(frozenset({"__name__": "c", **labels}.items()), samples)


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("sum(rate(c[2m]))", 1.0),
        ("sum(increase(c[2m]))", 120.0),
        ("sum(increase(c[3m]))", 150.0),
        ("sum(c) / 2 + 1", 61.0 + 15.0),
        ("avg(avg_over_time(c[1m]))", 120.0),
    ],
)
def test_promql_is_computed_as_prometheus_does(expression: str, value: float) -> None:
    """A counter that grows by one a second; at 150 s it is 150."""
    grows = counter(*(30.0 * number for number in range(6)))
    assert evaluate(expression, [grows], 150.0) == {frozenset(): pytest.approx(value)}


def test_a_counter_that_begins_anew_has_grown_by_what_it_has() -> None:
    found = evaluate("increase(c[2m])", [counter(100, 110, 5, 15, 25)], 120.0)
    assert found == {frozenset(): pytest.approx(35.0)}


def test_a_quantile_lies_within_its_bucket() -> None:
    buckets = [
        counter(count, le=edge) for edge, count in (("0.1", 50.0), ("0.2", 100.0), ("+Inf", 100.0))
    ]
    found = evaluate("histogram_quantile(0.75, c)", buckets, 0.0)
    assert found == {frozenset(): pytest.approx(0.15)}
