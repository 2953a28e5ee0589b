"""Figures of a report. Each takes its colours, so that a page can restyle them for a dark screen.

Series differ in line style as well as in colour. Labels are words of this module, never of data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

__all__ = [
    "PRINTED",
    "Palette",
    "coefficient_plot",
    "cosine_plot",
    "loss_plot",
    "operating_point_plot",
    "roc_curves_plot",
    "roc_plot",
    "trip_position_plot",
]

_EDGE = 1e-3
"""Left end of logarithmic axes; zero is drawn there."""
_RATE_TICKS = (0.001, 0.01, 0.1, 1.0)
_STYLES: tuple[Any, ...] = ("-", (0, (4, 1.5)))
_MANY_COLORS = ("#3b82c4", "#d9622b", "#2f9e6e", "#a855c7", "#b58900")
"""Told apart on a white ground and on a dark one; five, so that colours and the three styles below
come together again only after fifteen lines."""
_MANY_STYLES: tuple[Any, ...] = ("-", (0, (4, 1.5)), (0, (1, 1.2)))


class Palette(NamedTuple):
    ink: str
    grid: str
    series: tuple[str, str]


PRINTED = Palette(ink="#1a1a1a", grid="#d9d9d9", series=("#0068a8", "#c2410c"))
"""For picture files, which have a white ground."""


def loss_plot(log: Mapping[str, Sequence[float]], palette: Palette) -> Any:
    """Losses over the steps, before their coefficients."""
    lines = {"retain": "retain_loss", "reroute": "reroute_loss"}
    return _step_plot(log, lines, "loss, unweighted", palette)


def coefficient_plot(log: Mapping[str, Sequence[float]], palette: Palette) -> Any:
    """What the losses are multiplied by over the steps."""
    lines = {"retain": "retain_coefficient", "reroute": "reroute_coefficient"}
    return _step_plot(log, lines, "coefficient", palette)


def cosine_plot(log: Mapping[str, Sequence[float]], palette: Palette) -> Any:
    """Cosine of adapted and base states in each step's batch."""
    lines = {"benign batch": "retain_cosine", "harmful batch": "reroute_cosine"}
    return _step_plot(log, lines, "cosine of adapted and base", palette)


def roc_plot(
    false_positive: Sequence[float],
    true_positive: Sequence[float],
    at_threshold: tuple[float, float] | None,
    palette: Palette,
    *,
    logarithmic: bool,
) -> Any:
    """ROC curve per conversation; logarithmic shows the left end, where a guard works.

    Args:
        at_threshold: false- and true-positive rate of the calibrated threshold.
    """
    figure, axes = _axes("benign conversations that trip", "harmful that trip", palette)
    floor = _EDGE if logarithmic else 0.0
    x = np.maximum(np.asarray(false_positive, float), floor)
    axes.plot(x, true_positive, drawstyle="steps-post", color=palette.series[0], linewidth=1.4)
    if at_threshold is not None:
        point = (max(at_threshold[0], floor), at_threshold[1])
        axes.plot(
            *point,
            "o",
            color=palette.series[1],
            label="calibrated threshold",
            clip_on=False,
            zorder=3,
        )
        _legend(axes, palette, loc="lower right")
    if logarithmic:
        _log_rates(axes)
    else:
        axes.plot([0, 1], [0, 1], color=palette.grid, linewidth=1)
        axes.set_xlim(0, 1)
        _rate_ticks(axes.xaxis, (0.0, 0.25, 0.5, 0.75, 1.0))
    axes.set_ylim(0, 1.02)
    _rate_ticks(axes.yaxis, (0.0, 0.25, 0.5, 0.75, 1.0))
    return figure


def roc_curves_plot(
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]], palette: Palette
) -> Any:
    """Several ROC curves per conversation, at their left end, where a guard works.

    Args:
        curves: false- and true-positive rates over all thresholds, by label.
    """
    figure, axes = _axes("benign conversations that trip", "harmful that trip", palette)
    figure.set_size_inches(7.2, 4.2 + 0.2 * len(curves))
    for index, (label, (false_positive, true_positive)) in enumerate(curves.items()):
        axes.plot(
            np.maximum(np.asarray(false_positive, float), _EDGE),
            true_positive,
            drawstyle="steps-post",
            color=_MANY_COLORS[index % len(_MANY_COLORS)],
            linestyle=_MANY_STYLES[index % len(_MANY_STYLES)],
            linewidth=1.4,
            label=label,
        )
    _log_rates(axes)
    axes.set_ylim(0, 1.02)
    _rate_ticks(axes.yaxis, (0.0, 0.25, 0.5, 0.75, 1.0))
    figure.legend(frameon=False, labelcolor=palette.ink, loc="outside lower left")
    return figure


def operating_point_plot(
    false_positive: Sequence[float], true_positive: Sequence[float], palette: Palette
) -> Any:
    """What share of harmful conversations trips when the benign rate is promised to be below x."""
    figure, axes = _axes("promised bound of benign trips", "harmful that trip", palette)
    order = np.argsort(false_positive)
    x = np.maximum(np.asarray(false_positive, float)[order], _EDGE)
    y = np.asarray(true_positive, float)[order]
    axes.plot(x, y, "o-", color=palette.series[0], linewidth=1.4, markersize=4)
    _log_rates(axes)
    axes.set_ylim(0, 1.02)
    _rate_ticks(axes.yaxis, (0.0, 0.25, 0.5, 0.75, 1.0))
    return figure


def trip_position_plot(edges: Sequence[float], counts: Sequence[int], palette: Palette) -> Any:
    """How many response tokens were scored up to the trip."""
    figure, axes = _axes("response tokens up to the trip", "harmful conversations", palette)
    widths = np.diff(np.asarray(edges, float))
    axes.bar(edges[:-1], counts, widths, align="edge", color=palette.series[0], linewidth=0)
    axes.set_xlim(edges[0], edges[-1])
    axes.yaxis.get_major_locator().set_params(integer=True)
    return figure


def _step_plot(
    log: Mapping[str, Sequence[float]], lines: Mapping[str, str], ylabel: str, palette: Palette
) -> Any:
    figure, axes = _axes("step", ylabel, palette)
    for (label, key), color, style in zip(lines.items(), palette.series, _STYLES, strict=True):
        axes.plot(log["step"], log[key], label=label, color=color, linestyle=style, linewidth=1.4)
    _legend(axes, palette)
    return figure


def _axes(xlabel: str, ylabel: str, palette: Palette) -> tuple[Any, Any]:
    # The object interface keeps no global state and needs no display.
    figure = Figure(figsize=(4.8, 3.0), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_xlabel(xlabel, color=palette.ink)
    axes.set_ylabel(ylabel, color=palette.ink)
    axes.tick_params(which="both", color=palette.grid, labelcolor=palette.ink)
    axes.grid(color=palette.grid, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(palette.grid)
    return figure, axes


def _legend(axes: Any, palette: Palette, loc: str = "best") -> None:
    axes.legend(frameon=False, labelcolor=palette.ink, loc=loc)


def _log_rates(axes: Any) -> None:
    axes.set_xscale("log")
    axes.set_xlim(_EDGE, 1)
    axes.minorticks_off()
    _rate_ticks(axes.xaxis, _RATE_TICKS)


def _rate_ticks(axis: Any, rates: Sequence[float]) -> None:
    axis.set_ticks(rates, [f"{100 * rate:g} %" for rate in rates])
