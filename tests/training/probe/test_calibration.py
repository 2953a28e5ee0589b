"""Bounds against the exact binomial test of scipy, and the promise against simulation."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from circuit_breakers.artifact.manifest import Aggregation, ScoreHistogram
from circuit_breakers.errors import CalibrationError
from circuit_breakers.guard.aggregation import aggregate
from circuit_breakers_training.probe.calibration import (
    PeakScale,
    calibrate,
    calibrate_jointly,
    fpr_upper_bound,
    min_conversations,
    peak_histogram,
    peak_scale,
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


LADDER = (0.05, 0.02, 0.01, 0.005, 0.002, 0.001)


def test_curve_has_the_promises_that_the_data_supports() -> None:
    peak_N = np.random.default_rng(0).normal(size=700).astype(np.float32)
    threshold, calibration = calibrate(peak_N, target_fpr=0.01, max_tokens=9, ladder=LADDER)
    # ln(0.05) / ln(1 - p) conversations: 598 for 0.5 %, 1,497 for 0.2 %.
    assert [p.target_fpr for p in calibration.curve] == [0.05, 0.02, 0.01, 0.005]
    for point in calibration.curve:
        alone = calibrate(peak_N, target_fpr=point.target_fpr, max_tokens=9)
        assert point.threshold_logit == alone.threshold_logit
        assert point.num_trips == int((peak_N >= point.threshold_logit).sum())
        assert point.fpr_upper_bound == fpr_upper_bound(point.num_trips, 700) <= point.target_fpr
    assert calibration.curve[2].threshold_logit == threshold
    assert (calibration.target_fpr, calibration.num_trips) == (0.01, calibration.curve[2].num_trips)


def test_own_promise_is_in_the_curve_wherever_it_lies() -> None:
    peak_N = np.random.default_rng(0).normal(size=700).astype(np.float32)
    _, calibration = calibrate(peak_N, target_fpr=0.03, max_tokens=9, ladder=(0.01, 0.05, 0.01))
    assert [p.target_fpr for p in calibration.curve] == [0.05, 0.03, 0.01]
    assert calibrate(peak_N, target_fpr=0.03, max_tokens=9).calibration.curve == ()


@given(st.integers(1, 4), st.integers(0, 2**32 - 1))
@settings(max_examples=50)
def test_joint_thresholds_count_a_conversation_once(num_probes: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    # Of very different size, and correlated, as probes of one model are.
    size_P = 10.0 ** rng.integers(-3, 4, num_probes)
    common_N1 = rng.normal(size=(400, 1))
    peak_NP = ((common_N1 + rng.normal(size=(400, num_probes))) * size_P).astype(np.float32)
    other_NP = ((rng.normal(size=(99, 1)) + rng.normal(size=(99, num_probes))) * size_P).astype(
        np.float32
    )
    scales = [peak_scale(other_NP[:, p]) for p in range(num_probes)]
    calibrated = calibrate_jointly(peak_NP, scales, target_fpr=0.05, max_tokens=9, ladder=(0.02,))
    counts = {(c.calibration.num_trips, c.calibration.fpr_upper_bound) for c in calibrated}
    assert len(counts) == 1, "every probe carries the counts of the whole breaker"
    thresholds = np.array([c.threshold_logit for c in calibrated], np.float32)
    num_trips = int((peak_NP >= thresholds).any(axis=1).sum())
    assert counts == {(num_trips, fpr_upper_bound(num_trips, 400))}
    # Continuous scores have no ties, so all that is allowed is used: 12 of 400, from the bound.
    assert fpr_upper_bound(num_trips, 400) <= 0.05 < fpr_upper_bound(num_trips + 1, 400)
    for number in (0, 1):
        stored = {
            (p.target_fpr, p.num_trips, p.fpr_upper_bound)
            for p in (c.calibration.curve[number] for c in calibrated)
        }
        assert len(stored) == 1


def test_each_probe_gets_its_share_of_the_trips() -> None:
    rng = np.random.default_rng(0)
    peak_NP = (rng.normal(size=(2000, 2)) * [1.0, 100.0]).astype(np.float32)
    scales = [PeakScale(0.0, 1.0), PeakScale(0.0, 100.0)]
    calibrated = calibrate_jointly(peak_NP, scales, target_fpr=0.05, max_tokens=9)
    shares = [float((peak_NP[:, p] >= c.threshold_logit).mean()) for p, c in enumerate(calibrated)]
    # Alike but for their size, so each causes half of them: 4 % of 2,000 in all, give or take.
    assert shares[0] == pytest.approx(shares[1], abs=0.01)
    assert sum(shares) == pytest.approx(calibrated[0].calibration.num_trips / 2000, abs=0.002)


def test_probes_calibrated_one_by_one_would_break_the_promise() -> None:
    """Why the calibration is joint: eight probes at 1 % each trip on several times that."""
    rng = np.random.default_rng(0)
    peak_NP = rng.normal(size=(2000, 8)).astype(np.float32)
    fresh_NP = rng.normal(size=(20_000, 8)).astype(np.float32)
    alone = [calibrate(peak_NP[:, p], target_fpr=0.01, max_tokens=9) for p in range(8)]
    joint = calibrate_jointly(peak_NP, [PeakScale(0.0, 1.0)] * 8, target_fpr=0.01, max_tokens=9)

    def rate(calibrated: list) -> float:
        threshold_P = np.array([c.threshold_logit for c in calibrated], np.float32)
        return float((fresh_NP >= threshold_P).any(axis=1).mean())

    # 12 trips are allowed in 2,000: 0.6 % each, 1 - 0.994 ** 8 = 4.7 % together.
    assert rate(alone) > 0.03
    # Three standard errors of a share of 1 % in 20,000.
    assert rate(joint) <= 0.01 + 0.0021


def test_scale_is_that_of_the_middle_of_the_peaks() -> None:
    peaks = np.arange(101, dtype=np.float32)
    assert peak_scale(peaks) == (50.0, 40.0)  # deciles 10 and 90
    assert peak_scale(np.full(5, 7.0, np.float32)) == (7.0, 1.0)


def test_histogram_has_bins_of_as_many_conversations() -> None:
    # Deciles of 0, 1, ... 100 are 10, 20, ... 90; an edge belongs to the bin above it.
    histogram = peak_histogram(np.arange(101, dtype=np.float32))
    assert histogram.edges == (10, 20, 30, 40, 50, 60, 70, 80, 90)
    assert histogram.counts == (10, 10, 10, 10, 10, 10, 10, 10, 10, 11)


def test_histogram_of_ties_has_fewer_bins_and_every_conversation() -> None:
    assert peak_histogram(np.full(5, 7.0, np.float32)) == ScoreHistogram(edges=(7,), counts=(0, 5))
    # Nine of ten tie at 0: every decile but the last is 0, and that one lies between 0 and 1.
    tied = peak_histogram(np.array([0] * 9 + [1], np.float32))
    assert len(tied.edges) == 2 and tied.counts == (0, 9, 1)


def test_histogram_leaves_out_what_has_no_score() -> None:
    assert sum(peak_histogram(np.array([1, -np.inf, 2], np.float32)).counts) == 2


NUM_LOOKS = 150


def _random_walks(rng: np.random.Generator, count: int) -> list[np.ndarray]:
    """Token logits of benign conversations: walks that are pulled back to 0, each at its own level.

    The longer a conversation, and the more its tokens depend on each other, the further apart are
    what one token does and what a whole conversation does.
    """
    step_NT = rng.normal(size=(count, NUM_LOOKS))
    walk_NT = np.empty_like(step_NT)
    walk_NT[:, 0] = step_NT[:, 0]
    for t in range(1, NUM_LOOKS):
        walk_NT[:, t] = 0.9 * walk_NT[:, t - 1] + step_NT[:, t]
    lengths = rng.integers(20, NUM_LOOKS + 1, count)
    return [
        walk_T[:length].astype(np.float32) for walk_T, length in zip(walk_NT, lengths, strict=True)
    ]


@pytest.mark.parametrize(
    "aggregation",
    [
        Aggregation(kind="max"),
        Aggregation(kind="ema", alpha=0.12),
        Aggregation(kind="rolling_mean", window=16),
    ],
    ids=lambda a: a.kind,
)
def test_looking_after_every_token_is_paid_for(aggregation: Aggregation) -> None:
    """A quantile of tokens breaks the promise many times over; ours holds with its confidence."""
    target = 0.02
    # 95 % confidence allows 5 % of calibrations to miss; of 60, 3 plus 3 standard errors are 8.
    num_calibrations, num_allowed = 60, 8
    rng = np.random.default_rng(0)
    fresh_N = np.array([peak_score(x, aggregation) for x in _random_walks(rng, 4000)])
    walks = [_random_walks(rng, 300) for _ in range(num_calibrations)]
    true_rates, token_rates = [], []
    for rows in walks:
        scores = [aggregate(x, aggregation)[aggregation.skip_tokens :] for x in rows]
        peak_N = np.array([s.max() for s in scores], np.float32)
        threshold, _ = calibrate(peak_N, target_fpr=target, max_tokens=NUM_LOOKS)
        true_rates.append(float((fresh_N >= threshold).mean()))
        # max is compared by its tokens, as its running score is a running maximum already.
        looks = rows if aggregation.kind == "max" else scores
        by_token = np.quantile(np.concatenate(looks), 1 - target)
        token_rates.append(float((fresh_N >= by_token).mean()))
    assert min(token_rates) > 5 * target
    # Three standard errors of a share of 2 % in 4,000 conversations.
    margin = 3 * (target * (1 - target) / 4000) ** 0.5
    assert sum(rate > target + margin for rate in true_rates) <= num_allowed
    assert float(np.mean(true_rates)) <= target
