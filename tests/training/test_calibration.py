"""Bounds against the exact binomial test of scipy, and the promise against simulation."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from circuit_breakers.artifact.manifest import Aggregation
from circuit_breakers.errors import CalibrationError
from circuit_breakers_training.calibration import (
    calibrate,
    fpr_upper_bound,
    min_conversations,
    peak_score,
)

finite_scores = st.lists(
    st.floats(-1e6, 1e6, width=32, allow_nan=False), min_size=60, max_size=400
).map(lambda values: np.array(values, np.float32))


@given(st.integers(1, 3000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_bound_equals_exact_one_sided_interval(counts: tuple[int, int]) -> None:
    num_trips, num_conversations = counts
    exact = binomtest(num_trips, num_conversations, alternative="less").proportion_ci(
        0.95, method="exact"
    )
    assert fpr_upper_bound(num_trips, num_conversations) == pytest.approx(exact.high, rel=1e-9)


def test_conversations_needed_for_usual_promises() -> None:
    # ln(0.05) / ln(1 - p), rounded up: the "rule of three".
    assert min_conversations(0.01) == 299
    assert min_conversations(0.001) == 2995
    assert min_conversations(0.05) == 59


@given(st.floats(0.0005, 0.5), st.floats(0.5, 0.99))
def test_one_conversation_fewer_is_not_enough(target_fpr: float, confidence: float) -> None:
    count = min_conversations(target_fpr, confidence)
    assert fpr_upper_bound(0, count, confidence) <= target_fpr
    if count > 1:
        assert fpr_upper_bound(0, count - 1, confidence) > target_fpr


@given(finite_scores, st.floats(0.05, 0.5))
def test_threshold_is_the_smallest_within_the_bound(peak_N: np.ndarray, target: float) -> None:
    threshold, calibration = calibrate(peak_N, target_fpr=target, max_tokens=100)
    num_trips = int((peak_N >= threshold).sum())
    assert calibration.num_trips == num_trips
    assert calibration.num_conversations == len(peak_N)
    assert calibration.fpr_upper_bound == fpr_upper_bound(num_trips, len(peak_N)) <= target
    one_step_lower = np.nextafter(np.float32(threshold), np.float32(-np.inf))
    more_trips = int((peak_N >= one_step_lower).sum())
    assert fpr_upper_bound(more_trips, len(peak_N)) > target


@given(finite_scores, st.randoms(use_true_random=False))
@settings(max_examples=30)
def test_order_of_conversations_does_not_matter(peak_N: np.ndarray, random: object) -> None:
    shuffled = list(peak_N)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    first = calibrate(peak_N, target_fpr=0.05, max_tokens=9)
    assert calibrate(np.array(shuffled), target_fpr=0.05, max_tokens=9) == first


def test_promise_is_kept_where_a_plain_quantile_breaks_it() -> None:
    # True false-positive rate of a threshold t on uniform scores is 1 - t. The bound may fail in
    # 5 % of draws; 2,000 draws put the observed share within 3 standard errors (1.5 %) of that.
    rng = np.random.default_rng(0)
    broken = quantile_broken = 0
    for _ in range(2000):
        peak_N = rng.random(320, np.float32)
        threshold, _ = calibrate(peak_N, target_fpr=0.01, max_tokens=9)
        broken += 1 - threshold > 0.01
        quantile_broken += 1 - np.quantile(peak_N, 0.99) > 0.01
    assert broken / 2000 <= 0.065
    assert quantile_broken / 2000 > 0.3


def test_too_few_conversations_are_refused_with_the_number_needed() -> None:
    with pytest.raises(CalibrationError, match=r"got 298 benign .*1\.00%.*expected at least 299"):
        calibrate(np.zeros(298, np.float32), target_fpr=0.01, max_tokens=9)
    with pytest.raises(CalibrationError, match="got 0 benign"):
        calibrate(np.zeros(0, np.float32), target_fpr=0.01, max_tokens=9)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_scores_that_are_not_finite_are_refused(bad: float) -> None:
    peak_N = np.zeros(400, np.float32)
    peak_N[7] = bad
    with pytest.raises(CalibrationError, match="conversation 7 scores"):
        calibrate(peak_N, target_fpr=0.01, max_tokens=9)


def test_ties_at_the_threshold_do_not_trip() -> None:
    threshold, calibration = calibrate(np.ones(300, np.float32), target_fpr=0.01, max_tokens=9)
    assert threshold > 1.0
    assert calibration.num_trips == 0


def test_peak_is_the_largest_running_score_after_the_skipped_position() -> None:
    logit_T = np.array([9.0, 1.0, 3.0, 2.0], np.float32)
    assert peak_score(logit_T, Aggregation(kind="max")) == 3.0
    # Means of pairs after position 0: 1, (1 + 3) / 2, (3 + 2) / 2.
    assert peak_score(logit_T, Aggregation(kind="rolling_mean", window=2)) == 2.5
    assert peak_score(logit_T[:1], Aggregation(kind="max")) == -np.inf
    assert np.isnan(peak_score(np.array([0, np.nan, 5], np.float32), Aggregation(kind="max")))
