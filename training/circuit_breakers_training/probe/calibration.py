"""The thresholds that keep promises about false positives, and the data that supports them.

The promise is per conversation: at most a share `target_fpr` of benign conversations ever reaches
the threshold, prompt and completion together. A plain quantile misses such a promise about half of
the time. The threshold here is the smallest one whose Clopper-Pearson upper bound is within it.

A guard looks after every token, and each look is another chance to trip: a threshold that one token
in a hundred reaches stops far more than one conversation in a hundred. So the unit here is the
conversation, and its score is the largest running score of all of its tokens (peak_score). It
reaches a threshold exactly when some look does, however many there are and however they depend on
each other; nothing has to be corrected for looking often. The promise ends at the length of the
conversations that it was made on.

Probes that guard together make one promise, calibrated on the maximum over probes of their peaks.
Peaks are made comparable by centre and spread of each probe's benign peaks on the selection split,
other data than what the threshold is chosen on. A Bonferroni correction would need as many times
more conversations as there are probes, and as their trips overlap, would still trip less often than
promised.

Choosing the threshold from the same scores costs nothing: the false-positive rate just above the
(k + 1)-th largest of N scores is at most Beta(k + 1, N - k) distributed (Wilks 1941, tolerance
limits), and the Clopper-Pearson bound of k trips (Clopper and Pearson 1934) is a quantile of that.
That holds for each promise by itself: a server runs at one of them, chosen beforehand.

N benign conversations, T tokens of one of them, P probes of one breaker
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.stats import beta

from circuit_breakers.artifact.manifest import (
    Aggregation,
    Calibration,
    OperatingPoint,
    ScoreHistogram,
)
from circuit_breakers.errors import CalibrationError
from circuit_breakers.guard.aggregation import aggregate

__all__ = [
    "CalibratedThreshold",
    "PeakScale",
    "calibrate",
    "calibrate_jointly",
    "fpr_upper_bound",
    "min_conversations",
    "num_trips_allowed",
    "peak_histogram",
    "peak_scale",
    "peak_score",
]

FloatArray = npt.NDArray[np.float32]

_NUM_BINS = 10
"""Of a histogram, with as many conversations each: what a population stability index is usually
taken over, and few enough that some hundred conversations fill them."""


class CalibratedThreshold(NamedTuple):
    threshold_logit: float
    """A running score >= this trips."""
    calibration: Calibration


class PeakScale(NamedTuple):
    """Where a probe's benign peaks lie, to compare them with those of other probes."""

    centre: float
    spread: float


def peak_scale(peak_N: FloatArray) -> PeakScale:
    """Median of benign peaks and half the range of the middle 80 % of them."""
    low, centre, high = np.quantile(np.asarray(peak_N, np.float64), (0.1, 0.5, 0.9))
    # A probe that says the same of all conversations keeps its unit.
    return PeakScale(float(centre), float(high - low) / 2 or 1.0)


def peak_score(logit_T: FloatArray, aggregation: Aggregation) -> float:
    """Largest running score of a whole conversation: it trips at a threshold iff this reaches it.

    NaN if any scored token is NaN, -inf if no token is scored.
    """
    return float(np.max(aggregate(logit_T, aggregation), initial=-np.inf))


def peak_histogram(peak_N: FloatArray) -> ScoreHistogram:
    """Peaks of benign conversations in bins that hold as many each, as far as ties allow.

    Args:
        peak_N: highest running score of each, of one phase; -inf, for a phase without a scored
            token, is left out.
    """
    finite_N = np.asarray(peak_N, np.float64)[np.isfinite(peak_N)]
    edges = np.unique(np.quantile(finite_N, np.arange(1, _NUM_BINS) / _NUM_BINS))
    counts = np.bincount(np.searchsorted(edges, finite_N, side="right"), minlength=len(edges) + 1)
    return ScoreHistogram(edges=tuple(edges.tolist()), counts=tuple(counts.tolist()))


def fpr_upper_bound(num_trips: int, num_conversations: int, confidence: float = 0.95) -> float:
    """One-sided Clopper-Pearson upper bound of a rate, after `num_trips` in `num_conversations`."""
    assert 0 <= num_trips <= num_conversations and num_conversations > 0
    if num_trips == num_conversations:
        return 1.0
    return float(beta.ppf(confidence, num_trips + 1, num_conversations - num_trips))


def min_conversations(target_fpr: float, confidence: float = 0.95) -> int:
    """Fewest benign conversations that can support `target_fpr`, if none of them trips."""
    count = max(1, math.floor(math.log1p(-confidence) / math.log1p(-target_fpr)) - 1)
    while fpr_upper_bound(0, count, confidence) > target_fpr:
        count += 1
    return count


def calibrate(
    peak_N: FloatArray,
    *,
    target_fpr: float,
    max_tokens: int,
    confidence: float = 0.95,
    ladder: Sequence[float] = (),
) -> CalibratedThreshold:
    """Smallest threshold whose false-positive bound is within `target_fpr`, and its evidence.

    Args:
        peak_N: peak_score of each held-out benign conversation, seen by neither the adapter nor
            the probe.
        target_fpr: promised share of benign conversations that trip, at most.
        max_tokens: tokens of the longest of these conversations; the promise ends there.
        confidence: one-sided confidence of the bound.
        ladder: further promises whose thresholds go into the curve, where the data supports them.
    Raises:
        CalibrationError: too few conversations for the promise, or a score that is not finite.
    """
    (calibrated,) = calibrate_jointly(
        np.asarray(peak_N, np.float32)[:, None],
        [PeakScale(0.0, 1.0)],
        target_fpr=target_fpr,
        max_tokens=max_tokens,
        confidence=confidence,
        ladder=ladder,
    )
    return calibrated


def calibrate_jointly(
    peak_NP: FloatArray,
    scale_P: Sequence[PeakScale],
    *,
    target_fpr: float,
    max_tokens: int,
    confidence: float = 0.95,
    ladder: Sequence[float] = (),
) -> list[CalibratedThreshold]:
    """A threshold for each probe, such that the promise holds for all of them together.

    A conversation counts as one trip when any probe trips.

    Args:
        peak_NP: peak_score of each held-out benign conversation under each probe.
        scale_P: of each probe, from other conversations than these.
    Raises:
        CalibrationError: as calibrate.
    """
    peak_NP = np.asarray(peak_NP, np.float32)
    bad_N = ~np.isfinite(peak_NP).all(axis=1)
    if bad_N.any():
        bad = int(np.flatnonzero(bad_N)[0])
        raise CalibrationError(
            f"benign conversation {bad} scores {peak_NP[bad].tolist()}; expected a finite score; "
            "leave out conversations without a scored token, and check the probe and the model "
            "for NaN"
        )
    centre_P = np.array([scale.centre for scale in scale_P], np.float64)
    spread_P = np.array([scale.spread for scale in scale_P], np.float64)
    loudest_N = np.sort(((peak_NP - centre_P) / spread_P).max(axis=1))[::-1]
    num_allowed = {target_fpr: num_trips_allowed(len(peak_NP), target_fpr, confidence)}
    for target in ladder:
        if len(peak_NP) >= min_conversations(target, confidence):
            num_allowed[target] = num_trips_allowed(len(peak_NP), target, confidence)
    points: dict[float, list[OperatingPoint]] = {}
    for target in sorted(num_allowed, reverse=True):
        # Just above the largest peak that must not trip, in float32 as scores are when served.
        last_quiet_P = (centre_P + spread_P * loudest_N[num_allowed[target]]).astype(np.float32)
        threshold_P = np.nextafter(last_quiet_P, np.float32(np.inf))
        num_trips = int((peak_NP >= threshold_P).any(axis=1).sum())
        assert num_trips <= num_allowed[target], "nothing at or below the last quiet peak trips"
        points[target] = [
            OperatingPoint(
                target_fpr=target,
                threshold_logit=float(threshold),
                num_conversations=len(peak_NP),
                num_trips=num_trips,
                fpr_upper_bound=fpr_upper_bound(num_trips, len(peak_NP), confidence),
            )
            for threshold in threshold_P
        ]
    return [
        CalibratedThreshold(
            own.threshold_logit,
            Calibration(
                **own.model_dump(exclude={"threshold_logit"}),
                confidence=confidence,
                max_tokens=max_tokens,
                curve=tuple(of_probe[p] for of_probe in points.values()) if ladder else (),
            ),
        )
        for p, own in enumerate(points[target_fpr])
    ]


def num_trips_allowed(num_conversations: int, target_fpr: float, confidence: float = 0.95) -> int:
    """Most trips in `num_conversations` whose upper bound is still within `target_fpr`.

    Raises:
        CalibrationError: not even no trips at all would support it.
    """
    needed = min_conversations(target_fpr, confidence)
    if num_conversations < needed:
        shown = (
            f"even without a trip they only show a rate below "
            f"{fpr_upper_bound(0, num_conversations, confidence):.2%}"
            if num_conversations
            else "they show nothing"
        )
        raise CalibrationError(
            f"got {num_conversations} benign conversations for a false-positive rate of "
            f"{target_fpr:.2%} at confidence {confidence:.0%}: {shown}; expected at least "
            f"{needed}; add benign conversations to the calibration split or raise target_fpr"
        )
    num_allowed = 0
    while fpr_upper_bound(num_allowed + 1, num_conversations, confidence) <= target_fpr:
        num_allowed += 1
    return num_allowed
