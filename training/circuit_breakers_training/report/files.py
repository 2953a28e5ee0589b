"""The files of a report as they lie in an artifact."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from circuit_breakers_training.report.contents import build_document
from circuit_breakers_training.report.markdown import to_markdown
from circuit_breakers_training.report.page import to_html
from circuit_breakers_training.report.pictures import png_file

__all__ = ["log_columns", "report_files"]

_LOGGED = (
    "step",
    "loss",
    "retain_loss",
    "reroute_loss",
    "retain_cosine",
    "reroute_cosine",
    "retain_coefficient",
    "reroute_coefficient",
    "learning_rate",
    "grad_norm",
)
_MAX_POINTS = 500
"""Of a curve: more than a plot has pixels for."""


def report_files(metrics: Mapping[str, Any]) -> dict[str, bytes]:
    """Files of the report, by their path in the artifact.

    Args:
        metrics: plain JSON; what the pipeline measured, see pipeline.run_training.
    """
    document = build_document(metrics)
    return {
        "metrics.json": (json.dumps(metrics, indent=2, allow_nan=False) + "\n").encode(),
        "report.md": to_markdown(document).encode(),
        "report.html": to_html(document).encode(),
        **{
            f"plots/{plot.name}.png": png_file(plot)
            for plot in document.plots
            if not plot.page_only
        },
    }


def log_columns(entries: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """Curves of a training log, for metrics.json: what all entries have, thinned and rounded."""
    if not entries:
        return {}
    stride = -(-len(entries) // _MAX_POINTS)
    # Counted from the end: the last step is where the run went.
    kept = entries[::-1][::stride][::-1]
    return {
        name: [float(f"{entry[name]:.5g}") if name != "step" else entry[name] for entry in kept]
        for name in _LOGGED
        if all(name in entry for entry in kept)
    }
