"""The dashboard is what its generator writes, Grafana knows its fields, and its queries parse."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import promql_parser
import yaml
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard

from .panel_queries import DASHBOARD, concrete, metrics_of, panel_queries
from .test_rules import RULES, alerts, rules, run_promtool
from .tools import find_program

ROOT = Path(__file__).parents[2]


def test_dashboard_is_the_generators(tmp_path: Path) -> None:
    out = tmp_path / "dashboard.json"
    generator = ROOT / "docker" / "grafana" / "build_dashboard.py"
    subprocess.run([sys.executable, generator, out], check=True, timeout=60)
    assert DASHBOARD.read_text() == out.read_text(), "run docker/grafana/build_dashboard.py"


def test_grafana_knows_every_field() -> None:
    register_default_plugins()
    tree = json.loads(DASHBOARD.read_text())
    again = json.loads(json.dumps(Dashboard.from_json(tree), cls=JSONEncoder))
    # What the SDK does not know gets lost on the way.
    assert sorted(set(_paths(tree)) - set(_paths(again))) == []
    assert len(_paths(tree)) > 500


def test_a_misspelt_field_would_be_found() -> None:
    register_default_plugins()
    tree = json.loads(DASHBOARD.read_text())
    tree["panels"][1]["descriptoin"] = "x"
    again = json.loads(json.dumps(Dashboard.from_json(tree), cls=JSONEncoder))
    assert set(_paths(tree)) - set(_paths(again)) == {"panels.1.descriptoin"}


def test_panels_fill_the_grid_and_do_not_overlap() -> None:
    taken: dict[tuple[int, int], str] = {}
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        at = panel["gridPos"]
        for x in range(at["x"], at["x"] + at["w"]):
            for y in range(at["y"], at["y"] + at["h"]):
                assert x < 24 and (x, y) not in taken, (panel["title"], taken.get((x, y)))
                taken[x, y] = panel["title"]
    height = max(y for _, y in taken) + 1
    assert len(taken) == 24 * height


def test_every_expression_parses() -> None:
    expressions = [expr for _, expr in panel_queries()] + [rule["expr"] for rule in rules()]
    assert len(expressions) > 60
    for expr in expressions:
        promql_parser.parse(concrete(expr))


def test_every_alert_and_metric_that_matters_is_shown() -> None:
    shown = {name for _, expr in panel_queries() for name in metrics_of(expr)}
    for name, rule in alerts().items():
        watched = {m for m in metrics_of(rule["expr"]) if m != "up"}
        # An on-call engineer who opens the dashboard sees what the alert saw.
        assert any(m in shown for m in watched) or name in ("CircuitBreakersDown",), name


def test_prometheus_and_alertmanager_take_their_configurations() -> None:
    config = ROOT / "docker" / "prometheus" / "prometheus.yml"
    taken = run_promtool("check", "config", "--syntax-only", config)
    assert taken.returncode == 0 and "is valid prometheus config" in taken.stdout
    checked = subprocess.run(
        [
            find_program("amtool"),
            "check-config",
            ROOT / "docker" / "alertmanager" / "alertmanager.yml",
        ],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert checked.returncode == 0, checked.stderr
    assert "2 inhibit rules" in checked.stdout and "1 receivers" in checked.stdout


def test_scrape_job_has_the_name_that_the_alerts_know() -> None:
    config = yaml.safe_load((ROOT / "docker" / "prometheus" / "prometheus.yml").read_text())
    jobs = {job["job_name"] for job in config["scrape_configs"]}
    named = set(re.findall(r'job="([\w-]+)"', RULES.read_text()))
    assert named == {"circuit-breakers"} and named <= jobs


def test_provisioning_names_what_is_there() -> None:
    provisioning = ROOT / "docker" / "grafana" / "provisioning"
    source = yaml.safe_load((provisioning / "datasources" / "prometheus.yaml").read_text())
    scrape = yaml.safe_load((ROOT / "docker" / "prometheus" / "prometheus.yml").read_text())
    # $__rate_interval is four of these; with a wrong one, rates have holes.
    interval = source["datasources"][0]["jsonData"]["timeInterval"]
    assert interval == scrape["global"]["scrape_interval"]


def _paths(tree: Any, at: str = "") -> list[str]:
    if isinstance(tree, dict):
        return [p for k, v in tree.items() for p in (f"{at}{k}", *_paths(v, f"{at}{k}."))]
    if isinstance(tree, list):
        return [path for i, item in enumerate(tree) for path in _paths(item, f"{at}{i}.")]
    return []
