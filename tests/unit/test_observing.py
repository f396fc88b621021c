"""deploy/prometheus and deploy/grafana: rules and dashboards ask for metrics that exist; their own tools agree."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from deployments.metrics import METRICS

ROOT = Path(__file__).parents[2]
PROMETHEUS = ROOT / "deploy" / "prometheus"
DASHBOARDS = sorted((ROOT / "deploy" / "grafana").glob("*.json"))
LABELS = {name: set(metric.labels) | {"le"} for metric in METRICS for name in metric.series}
# Of Ray's own, those that are asked for; benchmarks/dashboards.py asks a running Prometheus for all of them.
RAYS = {"ray_node_mem_used"}
# Labels that Ray or Prometheus adds.
ADDED = {"WorkerId", "instance", "NodeAddress"}
NAME = re.compile(r"\bray_\w+")
SELECTOR = re.compile(r"(ray_\w+)\{([^}]*)\}")


def rules() -> list[dict[str, Any]]:
    [group] = yaml.safe_load((PROMETHEUS / "alerts.yml").read_text())["groups"]
    return group["rules"]


def queries(board: dict[str, Any]) -> Iterator[str]:
    for panel in board["panels"]:
        for target in panel.get("targets", []):
            yield target["expr"]
    for variable in board["templating"]["list"]:
        if variable["type"] == "query":
            yield variable["definition"]


def expressions() -> list[str]:
    boards = [json.loads(path.read_text()) for path in DASHBOARDS]
    return [rule["expr"] for rule in rules()] + [query for board in boards for query in queries(board)]


def test_there_is_something_to_check():
    assert len(DASHBOARDS) == 3
    assert len(expressions()) > 100


@pytest.mark.parametrize("expression", expressions())
def test_every_metric_that_is_asked_for_is_told(expression: str):
    assert set(NAME.findall(expression)) <= LABELS.keys() | RAYS
    for name, selector in SELECTOR.findall(expression):
        assert set(re.findall(r"(\w+)[=!]", selector)) <= LABELS[name], f"{name} has no such label"
    for labels in re.findall(r"\b(?:by|on)\s*\(([^)]*)\)", expression):
        asked = {label.strip() for label in labels.split(",")}
        assert asked <= set().union(*LABELS.values()) | ADDED


def test_every_metric_is_on_a_dashboard_or_in_a_rule():
    asked = {name for expression in expressions() for name in NAME.findall(expression)}
    unseen = [metric.name for metric in METRICS if not asked & set(metric.series)]
    assert not unseen


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.name)
def test_a_dashboard_is_whole(path: Path):
    board = json.loads(path.read_text())
    assert board["uid"] == path.stem
    ids = [panel["id"] for panel in board["panels"]]
    assert len(set(ids)) == len(ids)
    known = {variable["name"] for variable in board["templating"]["list"]}
    text = path.read_text()
    assert set(re.findall(r"\$\{?(\w+)", text.replace("$__all", ""))) <= known
    taken: set[tuple[int, int]] = set()
    for panel in board["panels"]:
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not cells & taken, f"{panel['title']} lies on another panel"
        assert max(x for x, _ in cells) < 24
        taken |= cells
        assert panel["type"] == "row" or panel["targets"]


def test_every_alert_has_a_section_that_says_what_to_do():
    page = (ROOT / "docs" / "alerts.md").read_text()
    sections = re.findall(r"^## (\w+)\n\n\*(\w+)\.\*", page, re.MULTILINE)
    assert sections == [(rule["alert"], rule["labels"]["severity"]) for rule in rules()]
    for rule in rules():
        assert rule["annotations"]["runbook"] == f"docs/alerts.md#{rule['alert'].lower()}"


def test_every_alert_is_tested_for_being_raised_and_for_silence():
    tests = yaml.safe_load((PROMETHEUS / "alerts.test.yml").read_text())["tests"]
    cases = [case for test in tests for case in test["alert_rule_test"]]
    names = {rule["alert"] for rule in rules()}
    assert {case["alertname"] for case in cases if case["exp_alerts"]} == names
    assert {case["alertname"] for case in cases if not case["exp_alerts"]} == names


@pytest.mark.parametrize(
    "command",
    [("check", "config", "prometheus.yml"), ("check", "rules", "alerts.yml"), ("test", "rules", "alerts.test.yml")],
    ids=" ".join,
)
def test_by_prometheus_own_tool(command):
    tool = shutil.which("promtool")
    if tool is None:
        pytest.skip("promtool is not installed (Debian: apt-get install prometheus)")
    done = subprocess.run([tool, *command], cwd=PROMETHEUS, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_scrape_configuration_reads_rays_discovery_file():
    config = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())
    [job] = config["scrape_configs"]
    assert job["file_sd_configs"] == [{"files": ["/tmp/ray/prom_metrics_service_discovery.json"]}]
    assert config["rule_files"] == ["alerts.yml"]
