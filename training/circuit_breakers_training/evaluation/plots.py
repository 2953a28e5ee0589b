"""PNG plots of an evaluation."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

__all__ = ["roc_plot", "tokens_to_trip_plot"]

_EDGE = 1e-3
"""Where a logarithmic axis draws zero."""


def roc_plot(curves: Mapping[str, tuple[Any, Any]], title: str) -> bytes:
    """ROC of each probe on one suite.

    Args:
        curves: false- and true-positive rates over all thresholds, by name of the probe.
    """
    figure, axes = _axes("benign requests that trip", "harmful requests that trip", title)
    axes.set_xscale("log")
    for name, (false_positive, true_positive) in curves.items():
        x = np.maximum(false_positive, _EDGE)
        axes.plot(x, true_positive, linewidth=1.2, drawstyle="steps-post", label=name)
    axes.set_xlim(_EDGE, 1)
    axes.set_ylim(0, 1.02)
    axes.legend(frameon=False, loc="lower right")
    return _png(figure)


def tokens_to_trip_plot(
    delivered: Mapping[str, Sequence[int]], never: Mapping[str, int], max_tokens: int
) -> bytes:
    """Histogram of the completion tokens delivered before a trip, stacked by suite.

    Args:
        delivered: one entry a harmful attempt that trips in its completion, by suite.
        never: harmful attempts that never trip, by suite.
        max_tokens: length limit of a completion.
    """
    figure, axes = _axes("completion tokens delivered before the trip", "harmful requests", "")
    bins = np.linspace(0, max_tokens + 1, min(max_tokens + 1, 32) + 1)
    labels = [f"{name} ({never[name]} never trip)" for name in delivered]
    axes.hist(list(delivered.values()), bins=bins, stacked=True, label=labels)
    axes.legend(frameon=False, fontsize="small")
    return _png(figure)


def _axes(xlabel: str, ylabel: str, title: str) -> tuple[Any, Any]:
    # The object interface keeps no global state and needs no display.
    figure = Figure(figsize=(6, 3.4), dpi=90, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.set_title(title)
    axes.grid(alpha=0.3)
    return figure, axes


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
