from __future__ import annotations

import numpy as np

from circuit_breakers_training.evaluation.plots import roc_plot, tokens_to_trip_plot


def test_plots_are_small_pngs_even_of_next_to_nothing() -> None:
    curve = (np.array([0.0, 0.5, 1.0]), np.array([0.0, 1.0, 1.0]))
    for png in (
        roc_plot({"layer1": curve, "layer2": curve}, "direct"),
        tokens_to_trip_plot({"direct": [0, 3, 64], "prefill": []}, {"direct": 1, "prefill": 9}, 64),
        tokens_to_trip_plot({"direct": []}, {"direct": 4}, 1),
    ):
        assert png.startswith(b"\x89PNG")
        assert len(png) < 60_000
