"""The threshold that keeps a promise about false positives, and the data that supports it.

The promise is per conversation: at most a share `target_fpr` of benign conversations ever reaches
the threshold, prompt and completion together. A plain quantile misses such a promise about half of
the time. The threshold here is the smallest one whose Clopper-Pearson upper bound is within it.

Choosing the threshold from the same scores costs nothing: the false-positive rate just above the
(k + 1)-th largest of N scores is at most Beta(k + 1, N - k) distributed (Wilks 1941, tolerance
limits), and the Clopper-Pearson bound of k trips (Clopper and Pearson 1934) is a quantile of that.

N benign conversations, T tokens of one of them
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.stats import beta

from circuit_breakers.artifact.manifest import Aggregation, Calibration
from circuit_breakers.errors import CalibrationError
from circuit_breakers.guard.aggregation import aggregate

__all__ = [
    "CalibratedThreshold",
    "calibrate",
    "fpr_upper_bound",
    "min_conversations",
    "num_trips_allowed",
    "peak_score",
]

FloatArray = npt.NDArray[np.float32]


class CalibratedThreshold(NamedTuple):
    threshold_logit: float
    """A running score >= this trips."""
    calibration: Calibration


def peak_score(logit_T: FloatArray, aggregation: Aggregation) -> float:
    """Largest running score of a whole conversation: it trips at a threshold iff this reaches it.

    NaN if any scored token is NaN, -inf if no token is scored.
    """
    return float(np.max(aggregate(logit_T, aggregation), initial=-np.inf))


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
    peak_N: FloatArray, *, target_fpr: float, max_tokens: int, confidence: float = 0.95
) -> CalibratedThreshold:
    """Smallest threshold whose false-positive bound is within `target_fpr`, and its evidence.

    Args:
        peak_N: peak_score of each held-out benign conversation, seen by neither the adapter nor
            the probe.
        target_fpr: promised share of benign conversations that trip, at most.
        max_tokens: tokens of the longest of these conversations; the promise ends there.
        confidence: one-sided confidence of the bound.
    Raises:
        CalibrationError: too few conversations for the promise, or a score that is not finite.
    """
    peak_N = np.asarray(peak_N, np.float32)
    if not np.isfinite(peak_N).all():
        bad = int(np.flatnonzero(~np.isfinite(peak_N))[0])
        raise CalibrationError(
            f"benign conversation {bad} scores {peak_N[bad]}; expected a finite score; leave out "
            "conversations without a scored token, and check the probe and the model for NaN"
        )
    num_allowed = num_trips_allowed(len(peak_N), target_fpr, confidence)
    # Just above the largest score that must not trip, in float32 as scores are when served.
    last_quiet = np.sort(peak_N)[::-1][num_allowed]
    threshold = np.nextafter(last_quiet, np.float32(np.inf))
    num_trips = int((peak_N >= threshold).sum())
    return CalibratedThreshold(
        float(threshold),
        Calibration(
            target_fpr=target_fpr,
            confidence=confidence,
            num_conversations=len(peak_N),
            num_trips=num_trips,
            fpr_upper_bound=fpr_upper_bound(num_trips, len(peak_N), confidence),
            max_tokens=max_tokens,
        ),
    )


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
