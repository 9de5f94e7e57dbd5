"""The dashboard can be imported, and each panel says what it shows and in what unit."""

from __future__ import annotations

import re
from typing import Any

import pytest

from tests.deploy.expressions import VARIABLES, asked, dashboard, filled_in, kept_labels, panels

PANELS = panels()
WIDTH = 24


def titled(panel: dict[str, Any]) -> str:
    return str(panel["title"])


def test_it_can_be_imported_into_any_grafana() -> None:
    content = dashboard()
    assert content["schemaVersion"] >= 39, "Grafana 10.2"
    assert "id" not in content, "it is the importing Grafana's to give"
    assert content["uid"] == content["title"] == "lora-gateway"
    variables = {variable["name"]: variable for variable in content["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    assert variables["datasource"]["query"] == "prometheus"
    for name in variables.keys() - {"datasource"}:
        assert variables[name]["datasource"]["uid"] == "${datasource}"
        assert variables[name]["definition"].startswith("label_values(")


def test_rows_tell_what_is_where() -> None:
    rows = [panel["title"] for panel in dashboard()["panels"] if panel["type"] == "row"]
    assert rows == ["Service", "Shards", "Adapters", "Training"]


def test_every_place_is_taken_once() -> None:
    every = dashboard()["panels"]
    assert len({panel["id"] for panel in every}) == len(every)
    taken: dict[tuple[int, int], str] = {}
    for panel in every:
        at = panel["gridPos"]
        for y in range(at["y"], at["y"] + at["h"]):
            for x in range(at["x"], at["x"] + at["w"]):
                assert x < WIDTH
                assert taken.setdefault((x, y), panel["title"]) == panel["title"]
    rows = max(y for _, y in taken) + 1
    assert len(taken) == rows * WIDTH, "and there are no holes"


@pytest.mark.parametrize("panel", PANELS, ids=titled)
def test_a_panel_says_what_it_shows(panel: dict[str, Any]) -> None:
    assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    assert panel["description"].endswith(".")
    defaults = panel["fieldConfig"]["defaults"]
    assert defaults["unit"] in {"s", "short", "percentunit", "reqps", "ops"}
    assert defaults["thresholds"]["steps"][0]["value"] is None
    assert panel["targets"]
    for target in panel["targets"]:
        assert target["datasource"] == panel["datasource"]
    assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])


@pytest.mark.parametrize("panel", PANELS, ids=titled)
def test_a_panel_asks_for_the_gateways_that_are_picked(panel: dict[str, Any]) -> None:
    for target in panel["targets"]:
        used = set(re.findall(r"\$\w+", target["expr"]))
        assert used <= VARIABLES.keys()
        assert all("instance" in one.labels for one in asked(filled_in(target["expr"])))


@pytest.mark.parametrize("panel", PANELS, ids=titled)
def test_a_legend_names_labels_that_are_there(panel: dict[str, Any]) -> None:
    for target in panel["targets"]:
        named = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
        kept = kept_labels(filled_in(target["expr"]))
        if kept is not None:
            assert named == kept
        else:
            selectors = [one.labels for one in asked(filled_in(target["expr"]))]
            assert named
            assert named <= frozenset.union(*selectors)
