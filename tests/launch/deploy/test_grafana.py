"""The Grafana dashboard shows every gauge of a run, and only what the code or Ray exports."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import ray

from launch.job.gauges import ATTEMPT, OF_METRICS, STEP, TAGS

FILE = Path(__file__).resolve().parents[3] / "launch" / "deploy" / "grafana.json"
RAYS_OWN = (
    Path(ray.__file__).parent / "dashboard" / "modules" / "metrics" / "dashboards" / "default_dashboard_panels.py"
)
WIDTH = 24
OURS = re.compile(r"\bray_(echox_\w+)")


@pytest.fixture(scope="module")
def dashboard() -> dict[str, Any]:
    return dict(json.loads(FILE.read_text(encoding="utf-8")))


@pytest.fixture(scope="module")
def graphs(dashboard: dict[str, Any]) -> list[dict[str, Any]]:
    return [panel for panel in dashboard["panels"] if panel["type"] != "row"]


@pytest.fixture(scope="module")
def expressions(graphs: list[dict[str, Any]]) -> list[str]:
    return [target["expr"] for panel in graphs for target in panel["targets"]]


def test_every_gauge_is_shown_and_no_other(expressions: list[str]) -> None:
    shown = [name for expression in expressions for name in OURS.findall(expression)]
    assert sorted(shown) == sorted(gauge.name for gauge in (STEP, ATTEMPT, *OF_METRICS.values()))


def test_gauges_are_told_apart_by_their_tags(dashboard: dict[str, Any], expressions: list[str]) -> None:
    """A restarted worker has other labels of Ray's, and is the same curve."""
    ours = [expression for expression in expressions if OURS.search(expression)]
    assert all(re.fullmatch(r'max by \(run, stage\) \(ray_echox_\w+\{run=~"\$run"\}\)', each) for each in ours)
    assert TAGS == ("run", "stage")
    names = {variable["name"]: variable for variable in dashboard["templating"]["list"]}
    assert names.keys() == {"datasource", "run"}
    assert names["run"]["query"]["query"] == f"label_values(ray_{STEP.name}, run)"


def test_other_metrics_are_those_of_rays_own_dashboards(expressions: list[str]) -> None:
    known = set(re.findall(r"\bray_\w+", RAYS_OWN.read_text(encoding="utf-8")))
    others = {name for each in expressions for name in re.findall(r"\bray_\w+", each) if not OURS.match(name)}
    assert len(others) >= 6 and others <= known


def test_panels_have_places_and_numbers_of_their_own(dashboard: dict[str, Any]) -> None:
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert len({panel["title"] for panel in panels}) == len(panels)
    places = [panel["gridPos"] for panel in panels]
    assert all(place["x"] >= 0 and place["w"] > 0 and place["x"] + place["w"] <= WIDTH for place in places)
    for one, other in itertools.combinations(places, 2):
        apart = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        assert apart or one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"], (one, other)


def test_every_graph_asks_the_chosen_prometheus(graphs: list[dict[str, Any]]) -> None:
    chosen = {"type": "prometheus", "uid": "${datasource}"}
    for panel in graphs:
        assert panel["type"] == "timeseries" and panel["description"] and panel["datasource"] == chosen
        letters = [target["refId"] for target in panel["targets"]]
        assert letters and len(set(letters)) == len(letters)
        assert all(target["datasource"] == chosen and target["legendFormat"] for target in panel["targets"])
