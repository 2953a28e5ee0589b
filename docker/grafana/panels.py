"""The kinds of panels that the dashboard has, each with its queries, size and place in the grid."""

from __future__ import annotations

from grafana_foundation_sdk.builders import common, dashboard, heatmap, prometheus, stat, timeseries
from grafana_foundation_sdk.models import common as common_model
from grafana_foundation_sdk.models import dashboard as model
from grafana_foundation_sdk.models import heatmap as heatmap_model
from grafana_foundation_sdk.models import prometheus as prometheus_model

__all__ = [
    "EIGHTH",
    "HALF",
    "HERE",
    "QUARTER",
    "RATE",
    "SOURCE",
    "THIRD",
    "dashed",
    "lines",
    "must_be_zero",
    "quantiles",
    "query",
    "scores",
    "stat_of",
    "steps",
    "words",
]

SOURCE = model.DataSourceRef(type_val="prometheus", uid="${datasource}")
HERE = 'instance=~"$instance"'
"""The servers that are chosen in the dashboard."""
RATE = "[$__rate_interval]"
HALF, THIRD, QUARTER, EIGHTH = 12, 8, 6, 3
"""Widths, of the 24 columns of Grafana's grid."""


def query(expr: str, legend: str, ref: str = "A") -> prometheus.Dataquery:
    return prometheus.Dataquery().expr(expr).legend_format(legend).ref_id(ref).range()


def stat_of(title: str, expr: str, text: str, *, legend: str = "") -> stat.Panel:
    return (
        stat.Panel()
        .title(title)
        .description(text)
        .datasource(SOURCE)
        .height(4)
        .span(EIGHTH)
        .graph_mode(common_model.BigValueGraphMode.NONE)
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
        .with_target(query(expr, legend))
    )


def must_be_zero(title: str, counter: str, width: int = EIGHTH) -> stat.Panel:
    panel = stat_of(title, f"sum({counter}{{{HERE}}})", "Since the servers started; must stay 0.")
    return panel.span(width).thresholds(steps("green", (1, "red")))


def lines(title: str, text: str, *, unit: str = "short") -> timeseries.Panel:
    return (
        timeseries.Panel()
        .title(title)
        .description(text)
        .datasource(SOURCE)
        .height(8)
        .span(HALF)
        .unit(unit)
        .min(0)
        .line_width(1.5)
        .fill_opacity(8)
        .legend(
            common.VizLegendOptions()
            .display_mode(common_model.LegendDisplayMode.LIST)
            .placement(common_model.LegendPlacement.BOTTOM)
            .show_legend(True)
        )
    )


def quantiles(title: str, histogram: str, unit: str, text: str) -> timeseries.Panel:
    panel = lines(title, text, unit=unit).span(THIRD)
    for ref, quantile in (("A", 0.5), ("B", 0.9), ("C", 0.99)):
        rate = f"sum by (le) (rate({histogram}_bucket{{{HERE}}}{RATE}))"
        panel.with_target(
            query(f"histogram_quantile({quantile}, {rate})", f"p{quantile * 100:.0f}", ref=ref)
        )
    return panel


def scores(phase: str) -> heatmap.Panel:
    buckets = f'circuit_breakers_score_bucket{{{HERE},phase="{phase}"}}'
    target = query(f"sum by (le) (increase({buckets}{RATE}))", "{{le}}")
    return (
        heatmap.Panel()
        .title(f"Scores of {phase}s")
        .description(
            "Highest running score of each request, a logit; the threshold is in /v1/breaker."
        )
        .datasource(SOURCE)
        .height(8)
        .span(HALF)
        .calculate(False)
        .color(
            heatmap.HeatmapColorOptions()
            .mode(heatmap_model.HeatmapColorMode.SCHEME)
            .scheme("Spectral")
            .steps(64)
            .reverse(False)
        )
        .with_target(target.format(prometheus_model.PromQueryFormat.HEATMAP))
    )


def steps(base: str, *above: tuple[float, str]) -> dashboard.ThresholdsConfig:
    return (
        dashboard.ThresholdsConfig()
        .mode(model.ThresholdsMode.ABSOLUTE)
        .steps(
            [
                model.Threshold(value=None, color=base),
                *(model.Threshold(value=value, color=color) for value, color in above),
            ]
        )
    )


def words(by_value: dict[str, str]) -> model.ValueMap:
    return model.ValueMap(
        options={value: model.ValueMappingResult(text=text) for value, text in by_value.items()}
    )


def dashed() -> model.DynamicConfigValue:
    return model.DynamicConfigValue(
        id_val="custom.lineStyle", value={"fill": "dash", "dash": [8, 8]}
    )
