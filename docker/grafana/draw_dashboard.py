#!/usr/bin/env python3
"""Draws the dashboard without Grafana: its panels, queries and places, on a Prometheus's data.

    python docker/grafana/draw_dashboard.py http://localhost:9090 OUT.png [MINUTES]

For pictures in documents and for a look where there is no Grafana. Every number in it comes from
the queries of helm/monitoring/dashboard.json.
"""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

DASHBOARD = Path(__file__).parents[2] / "helm" / "monitoring" / "dashboard.json"
ROW_IN, COLUMN_IN = 0.28, 0.5
"""One cell of Grafana's grid, in inches."""
MAX_SERIES = 8
"""With more in a panel, those that are always 0 are left out."""
SERIES = list[tuple[str, list[float], list[float]]]
INK, PAPER, CARD = "#d8d9da", "#111217", "#181b1f"


def main(prometheus: str, out: str, minutes: float = 10) -> None:
    panels = json.loads(DASHBOARD.read_text())["panels"]
    rows = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in panels)
    plt.rcParams.update({"text.color": INK, "axes.edgecolor": "#34363d", "font.size": 6.5})
    plt.rcParams.update({"xtick.color": INK, "ytick.color": INK, "axes.facecolor": CARD})
    figure = plt.figure(figsize=(24 * COLUMN_IN, rows * ROW_IN), facecolor=PAPER)
    with httpx.Client(base_url=prometheus, timeout=30) as client:
        for panel in panels:
            at = panel["gridPos"]
            if panel["type"] == "row":
                y = 1 - (at["y"] + 0.75) / rows
                figure.text(0.008, y, f"▾ {panel['title']}", size=9, weight="bold")
                continue
            series = [s for t in panel["targets"] for s in read(client, t, minutes)]
            bottom, pad = 1 - (at["y"] + at["h"]) / rows, 1.1 / rows
            axes = figure.add_axes(
                (
                    at["x"] / 24 + 0.03,
                    bottom + pad,
                    at["w"] / 24 - 0.038,
                    at["h"] / rows - 2 * pad,
                )
            )
            axes.set_title(panel["title"], loc="left", size=7.5, pad=3)
            draw = {"stat": draw_number, "heatmap": draw_heatmap}.get(panel["type"], draw_lines)
            draw(axes, series, panel["fieldConfig"]["defaults"])
    figure.savefig(out, dpi=110)


def read(client: httpx.Client, target: dict[str, Any], minutes: float) -> SERIES:
    """Legend, minutes before now, and values of each series."""
    expr = target["expr"].replace("$__rate_interval", "1m").replace("$instance", ".*")
    now_s = time.time()
    span = {"start": now_s - minutes * 60, "end": now_s, "step": max(1, minutes * 60 / 200)}
    answer = client.get("/api/v1/query_range", params={"query": expr, **span}).json()
    found: SERIES = []
    for series in answer["data"]["result"]:
        name = target["legendFormat"]
        for label, value in series["metric"].items():
            name = name.replace("{{" + label + "}}", value)
        times = [(float(t) - now_s) / 60 for t, _ in series["values"]]
        found.append((name, times, [float(v) for _, v in series["values"]]))
    return found


def draw_lines(axes: Any, series: SERIES, defaults: dict[str, Any]) -> None:
    percent = defaults.get("unit") == "percentunit"
    if len(series) > MAX_SERIES:
        series = [s for s in series if any(s[2])]
    for name, times, values in series:
        scaled = [100 * v if percent else v for v in values]
        axes.plot(times, scaled, label=name, lw=1.1, ls="--" if name in ("burst", "high") else "-")
    axes.set_ylim(bottom=0)
    axes.grid(color="#2a2d33", lw=0.5)
    unit = {"percentunit": "%", "ops": "1/s", "reqps": "1/s", "s": "s"}.get(defaults["unit"], "")
    axes.set_ylabel(unit)
    if series:
        axes.legend(fontsize=5, frameon=False, labelcolor=INK, loc="upper left", ncols=2)
    else:
        axes.text(0.5, 0.5, "no data", transform=axes.transAxes, ha="center")


def draw_number(axes: Any, series: SERIES, defaults: dict[str, Any]) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    if not series:
        axes.text(0.5, 0.5, "no data", transform=axes.transAxes, ha="center")
        return
    name, _, values = series[0]
    value = values[-1]
    words = defaults.get("mappings", [{}])[0].get("options", {}) if defaults.get("mappings") else {}
    shown = words.get(f"{value:g}", {}).get("text") or duration_or_number(value, defaults)
    if name:
        shown = f"{name}: {shown}"
    steps = defaults.get("thresholds", {}).get("steps", [{"color": "white", "value": None}])
    color = [s["color"] for s in steps if s["value"] is None or value >= s["value"]][-1]
    ink = {"green": "#73bf69", "red": "#f2495c"}.get(color, INK)
    size = 13 if len(shown) < 9 else 8
    axes.text(
        0.5, 0.45, shown, transform=axes.transAxes, ha="center", va="center", size=size, color=ink
    )


def duration_or_number(value: float, defaults: dict[str, Any]) -> str:
    if defaults.get("unit") != "s":
        return f"{value:g}"
    for unit, seconds in (("d", 86400), ("h", 3600), ("min", 60)):
        if value >= seconds:
            return f"{value / seconds:.3g} {unit}"
    return f"{value:.3g} s"


def draw_heatmap(axes: Any, series: SERIES, defaults: dict[str, Any]) -> None:
    # Buckets are cumulative: each less the one below it.
    buckets = sorted((float(name), times, values) for name, times, values in series)
    below = [0.0] * len(buckets[0][2]) if buckets else []
    cells = []
    for _, _, values in buckets:
        cells.append([v - b if v > b else math.nan for v, b in zip(values, below, strict=True)])
        below = values
    if buckets:
        axes.pcolormesh(buckets[0][1], range(len(cells)), cells, cmap="YlOrRd", shading="nearest")
        axes.set_yticks(range(0, len(buckets), 3), [f"≤ {b[0]:g}" for b in buckets[::3]])
        axes.set_ylim(-0.5, len(buckets) - 0.5)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *map(float, sys.argv[3:]))
