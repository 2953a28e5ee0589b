#!/usr/bin/env python3
"""Writes the Grafana dashboard, helm/monitoring/dashboard.json or the file that is named.

Run it after a change here. Compose provisions the file, the Helm chart carries it. `instance` is
the one filter; what a recording rule sums up has no instance any more and is not filtered.
"""

from __future__ import annotations

import json
import sys
from itertools import count
from pathlib import Path
from typing import Any

from grafana_foundation_sdk.builders import dashboard
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common as common_model
from grafana_foundation_sdk.models import dashboard as model
from panels import (
    HALF,
    HERE,
    QUARTER,
    RATE,
    SOURCE,
    THIRD,
    dashed,
    lines,
    must_be_zero,
    quantiles,
    query,
    scores,
    stat_of,
    steps,
    words,
)

OUT = Path(__file__).parents[2] / "helm" / "monitoring" / "dashboard.json"


def dashboard_json() -> str:
    """The dashboard as Grafana reads it, without fields that say nothing."""
    built = (
        dashboard.Dashboard("Circuit Breakers")
        .uid("circuit-breakers")
        .description("The guard: trips, scores, faults; traffic, latency, audit log.")
        .tags(["circuit-breakers", "vllm"])
        .timezone("browser")
        .time("now-1h", "now")
        .refresh("30s")
        .tooltip(model.DashboardCursorSync.CROSSHAIR)
        .with_variable(
            dashboard.DatasourceVariable("datasource").label("Source").type("prometheus")
        )
        .with_variable(_instances())
        .annotation(_firing_alerts())
    )
    ids = count(1)
    for title, panels in (
        ("Safety", _safety()),
        ("Traffic", _traffic()),
        ("Latency", _latency()),
        ("Audit log", _audit()),
    ):
        built.with_row(dashboard.Row(title).id(next(ids)))
        for panel in panels:
            built.with_panel(panel.id(next(ids)))
    tree = json.loads(json.dumps(built.build(), cls=JSONEncoder))
    return json.dumps(_without_nulls(tree), indent=2, sort_keys=True) + "\n"


def _safety() -> list[Any]:
    return [
        stat_of("Servers ready", f"sum(circuit_breakers_ready{{{HERE}}})", "of those that answer")
        .thresholds(steps("red", (1, "green")))
        .with_target(query(f"count(circuit_breakers_ready{{{HERE}}})", "known", ref="B")),
        stat_of(
            "Canaries",
            f"min(circuit_breakers_canary_ok{{{HERE}}})",
            "Conversations with a known verdict, the worst server's.",
        )
        .thresholds(steps("red", (1, "green")))
        .mappings([words({"0": "failing", "1": "as expected"})]),
        stat_of(
            "Canaries ran",
            f"time() - min(circuit_breakers_canary_last_run_timestamp_seconds{{{HERE}}})",
            "Time since then, the longest.",
        ).unit("s"),
        must_be_zero("Tokens without a score", "circuit_breakers_unscored_tokens_total"),
        must_be_zero("Tokens leaked", "circuit_breakers_leaked_tokens_total"),
        stat_of(
            "Breaker",
            f"count by (artifact, mode) (circuit_breakers_breaker_info{{{HERE}}})",
            "Servers by the breaker and the mode of most requests; two breakers: a rolling update.",
            legend="{{artifact}}, {{mode}}",
        )
        .text_mode(common_model.BigValueTextMode.VALUE_AND_NAME)
        .span(QUARTER),
        stat_of(
            "Calibrated",
            f"max(circuit_breakers_calibration_age_seconds{{{HERE}}})",
            "Age of the oldest calibration.",
        ).unit("s"),
        lines("Trips", "Tripped streams a second.", unit="ops").with_target(
            query(
                "sum by (policy, phase, action)"
                f" (rate(circuit_breakers_trips_total{{{HERE}}}{RATE}))",
                "{{policy}}, {{phase}}, {{action}}",
            )
        ),
        lines("Trips per request", "Dashed: the burn alerts' limits.", unit="percentunit")
        .with_target(
            query("policy:circuit_breakers_trips_per_request:ratio_rate5m", "{{policy}}, 5 min")
        )
        .with_target(
            query(
                "policy:circuit_breakers_trips_per_request:ratio_rate1h", "{{policy}}, 1 h", ref="B"
            )
        )
        .with_target(query("14.4 * circuit_breakers:trip_budget:ratio", "burst", ref="C"))
        .with_target(query("6 * circuit_breakers:trip_budget:ratio", "high", ref="D"))
        .override_by_regexp("burst|high", [dashed()]),
        scores("prompt"),
        scores("completion"),
        lines("Score drift", "Population stability index; above 0.25 is a big shift.")
        .span(THIRD)
        .with_target(
            query(f"max by (phase) (circuit_breakers_score_drift{{{HERE}}})", "{{phase}}")
        ),
        quantiles(
            "Position of trips",
            "circuit_breakers_trip_token_index",
            "none",
            "Token of prompt and completion.",
        ),
        lines(
            "Tokens", "Fed to the model and generated, by vLLM; scored, by the guard.", unit="ops"
        )
        .span(THIRD)
        .with_target(
            query(
                f"sum(rate(vllm:prompt_tokens_total{{{HERE}}}{RATE}))"
                f" + sum(rate(vllm:generation_tokens_total{{{HERE}}}{RATE}))",
                "vLLM",
            )
        )
        .with_target(
            query(
                f"sum(rate(circuit_breakers_scored_tokens_total{{{HERE}}}{RATE}))",
                "scored",
                ref="B",
            )
        ),
    ]


def _traffic() -> list[Any]:
    return [
        lines("Requests", "A second, by how they ended.", unit="reqps")
        .span(THIRD)
        .with_target(
            query(
                f"sum by (outcome) (rate(circuit_breakers_requests_total{{{HERE}}}{RATE}))",
                "{{outcome}}",
            )
        ),
        lines("Refused", "A second, by the limit that was met.", unit="reqps")
        .span(THIRD)
        .with_target(
            query(
                f"sum by (reason) (rate(circuit_breakers_refused_requests_total{{{HERE}}}{RATE}))",
                "{{reason}}",
            )
        ),
        lines("Running and waiting", "Requests inside the server, and vLLM's batch.")
        .span(THIRD)
        .with_target(query(f"sum(circuit_breakers_running_requests{{{HERE}}})", "running"))
        .with_target(query(f"sum(circuit_breakers_waiting_requests{{{HERE}}})", "waiting", ref="B"))
        .with_target(
            query(f"sum(vllm:num_requests_running{{{HERE}}})", "in vLLM's batch", ref="C")
        ),
    ]


def _latency() -> list[Any]:
    return [
        quantiles(
            "Time to the first scored token",
            "circuit_breakers_delivered_ttft_seconds",
            "s",
            "As handed on, the hold-back included.",
        ),
        quantiles(
            "Time to first token in vLLM",
            "vllm:time_to_first_token_seconds",
            "s",
            "Before the hold-back.",
        ),
        quantiles("Time between tokens", "vllm:inter_token_latency_seconds", "s", "In vLLM."),
        quantiles("Whole requests", "vllm:e2e_request_latency_seconds", "s", "In vLLM.").span(HALF),
        lines(
            "Tokens held back", "Scored tokens withheld from the client, mean of a request."
        ).with_target(
            query(
                f"sum(rate(circuit_breakers_held_tokens_sum{{{HERE}}}{RATE}))"
                f" / sum(rate(circuit_breakers_held_tokens_count{{{HERE}}}{RATE}))",
                "mean",
            )
        ),
    ]


def _audit() -> list[Any]:
    return [
        must_be_zero("Entries lost", "circuit_breakers_audit_dropped_total")
        .height(8)
        .span(THIRD // 2),
        must_be_zero("Score traces lost", "circuit_breakers_traces_dropped_total")
        .height(8)
        .span(THIRD // 2),
        lines("Entries that wait", "For the database, in the spool.")
        .span(THIRD)
        .with_target(
            query(f"sum by (instance) (circuit_breakers_audit_spooled{{{HERE}}})", "{{instance}}")
        ),
        lines("Newest row", "Number of the newest row that each server has written.")
        .span(THIRD)
        .with_target(
            query(f"max by (instance) (circuit_breakers_audit_sequence{{{HERE}}})", "{{instance}}")
        ),
    ]


def _instances() -> dashboard.QueryVariable:
    return (
        dashboard.QueryVariable("instance")
        .label("Server")
        .datasource(SOURCE)
        .query({"query": "label_values(circuit_breakers_ready, instance)", "refId": "instance"})
        .refresh(model.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .multi(True)
        .include_all(True)
        .all_value(".*")
        .current(model.VariableOption(selected=True, text="All", value="$__all"))
    )


def _firing_alerts() -> dashboard.AnnotationQuery:
    return (
        dashboard.AnnotationQuery()
        .name("Alerts")
        .datasource(SOURCE)
        .enable(True)
        .icon_color("red")
        .expr('ALERTS{alertname=~"CircuitBreakers.*",alertstate="firing"}')
    )


def _without_nulls(tree: Any) -> Any:
    # A threshold's null is minus infinity, the one that Grafana wants to see.
    if isinstance(tree, dict):
        kept = {k: v for k, v in tree.items() if v is not None or set(tree) == {"value", "color"}}
        return {key: _without_nulls(value) for key, value in kept.items()}
    return [_without_nulls(item) for item in tree] if isinstance(tree, list) else tree


if __name__ == "__main__":
    (Path(sys.argv[1]) if sys.argv[1:] else OUT).write_text(dashboard_json())
