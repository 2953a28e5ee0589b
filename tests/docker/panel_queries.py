"""The queries of the dashboard's panels, annotations included, and the series that they read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import promql_parser

__all__ = ["DASHBOARD", "PanelQuery", "concrete", "metrics_of", "panel_queries"]

DASHBOARD = Path(__file__).parents[2] / "helm" / "monitoring" / "dashboard.json"


class PanelQuery(NamedTuple):
    title: str
    expr: str


def panel_queries() -> list[PanelQuery]:
    tree = json.loads(DASHBOARD.read_text())
    panels = [
        PanelQuery(panel["title"], target["expr"])
        for panel in tree["panels"]
        for target in panel.get("targets", ())
    ]
    return panels + [PanelQuery(a["name"], a["expr"]) for a in tree["annotations"]["list"]]


def concrete(expr: str, rate_interval: str = "1m") -> str:
    """The query that Grafana would send with every server chosen."""
    return expr.replace("$__rate_interval", rate_interval).replace("$instance", ".*")


def metrics_of(query: Any) -> set[str]:
    """Names of the series that an expression, as text or parsed, reads."""
    if isinstance(query, str):
        return metrics_of(promql_parser.parse(concrete(query)))
    if isinstance(query, promql_parser.VectorSelector):
        assert query.name is not None, "a selector without a name"
        return {query.name}
    if isinstance(query, promql_parser.MatrixSelector):
        return metrics_of(query.vector_selector)
    if isinstance(query, promql_parser.BinaryExpr):
        return metrics_of(query.lhs) | metrics_of(query.rhs)
    if isinstance(query, promql_parser.Call):
        return {name for argument in query.args for name in metrics_of(argument)}
    if isinstance(query, (promql_parser.NumberLiteral, promql_parser.StringLiteral)):
        return set()
    return metrics_of(query.expr)
