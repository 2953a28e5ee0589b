"""Figures of looks that are written by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from circuit_breakers.errors import CalibrationError, DataError, EvaluationError
from circuit_breakers_training.evaluation.rates import clopper_pearson
from circuit_breakers_training.peers.figures import (
    Looks,
    Threshold,
    calibrated,
    cpu_ms,
    figures,
    one_thread,
)
from circuit_breakers_training.probe.calibration import fpr_upper_bound
from circuit_breakers_training.report.numbers import auroc_interval

from .conftest import make_case, scores


def looks(*values: float, at: tuple[int, ...] | None = None) -> Looks:
    return Looks(scores(values), np.array(at if at is not None else range(len(values))))


@pytest.mark.parametrize(
    ("threshold", "leaked"),
    [
        (0.5, 0),  # on the prompt
        (2.0, 2),  # at the look that has seen two tokens, not at the louder one behind it
        (3.0, 5),
        (3.5, 9),  # never: a reader gets all nine
    ],
)
def test_leaks_are_what_a_reader_had_at_the_tripping_look(threshold: float, leaked: int) -> None:
    assert looks(1, 2, 3, at=(0, 2, 5)).leaked(threshold, 9) == leaked


def test_row_of_a_guard(tokenizer: Any) -> None:
    cases = [make_case(tokenizer, "harmful", f"please h{i}", "h1 h2 h3 h4") for i in range(3)]
    cases += [make_case(tokenizer, "benign", f"please b{i}", "b1 b2") for i in range(2)]
    seen = [
        looks(0, 5, at=(0, 2)),  # trips after two of four tokens
        looks(6, 0, at=(0, 2)),  # trips on the prompt
        looks(1, 2, at=(0, 2)),  # does not trip: all four
        looks(3, 0, at=(0, 2)),
        looks(0, 4, at=(0, 2)),  # a score equal to the threshold trips
    ]
    row = figures("guard", "all", seen, cases, Threshold(4.0, 300, 0), cost_ms=1.5)
    assert (row.num_harmful, row.num_benign, row.cost_ms) == (3, 2, 1.5)
    # Of 3 x 2 pairs of peaks (5, 6, 2) and (3, 4), two are the wrong way round.
    assert row.auroc == pytest.approx(4 / 6)
    interval = auroc_interval(4 / 6, 3, 2)
    assert interval is not None
    assert (row.auroc_low, row.auroc_high) == interval
    assert row.tpr is not None and row.benign is not None and row.leak is not None
    assert (row.tpr.count, row.tpr.num, row.tpr.low, row.tpr.high) == (2, 3, *clopper_pearson(2, 3))
    assert (row.benign["num_trips"], row.benign["upper_bound"]) == (1, fpr_upper_bound(1, 2))
    assert (row.leak.num_tokens, row.leak.of, row.leak.median) == (2 + 0 + 4, 12, 2.0)
    assert row.leak.share == 0.5
    assert (row.false_positive[0], row.true_positive[-1]) == (0.0, 1.0)


def test_threshold_is_just_above_the_benign_peaks(tokenizer: Any) -> None:
    cases = [make_case(tokenizer, "benign", "please b1", "b2")] * 59
    # 59 without a trip show a rate below 5 %; with one, they do not (Clopper-Pearson).
    found = calibrated(
        [looks(-1, value) for value in range(59)], cases, target_fpr=0.05, confidence=0.95
    )
    assert found == Threshold(float(np.nextafter(np.float32(58), np.float32(np.inf))), 59, 0)
    with pytest.raises(CalibrationError, match="expected at least 59"):
        calibrated([looks(0)] * 58, cases[:58], target_fpr=0.05, confidence=0.95)
    with pytest.raises(CalibrationError, match="finite"):
        calibrated([looks(math.nan)] * 59, cases, target_fpr=0.05, confidence=0.95)


def test_one_label_or_a_score_that_is_no_number_is_refused(tokenizer: Any) -> None:
    harmful = make_case(tokenizer, "harmful", "please h1", "h2")
    benign = make_case(tokenizer, "benign", "please b1", "b2")
    with pytest.raises(DataError, match="expected both labels"):
        figures("guard", "all", [looks(1)], [harmful], Threshold(0, 1, 0))
    with pytest.raises(EvaluationError, match="guard: got 1 of 2"):
        figures("guard", "all", [looks(1), looks(math.nan)], [harmful, benign], Threshold(0, 1, 0))


def test_cost_is_cpu_time_of_at_most_twenty_items_and_one_to_warm_up() -> None:
    seen: list[int] = []
    assert cpu_ms(seen.append, range(40)) >= 0
    assert seen == [0, *range(0, 40, 2)]


def test_threads_are_given_back() -> None:
    before = torch.get_num_threads()
    with one_thread():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before
